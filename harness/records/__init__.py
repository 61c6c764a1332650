"""Records of runs: what one holds, and the files in which they lie."""
