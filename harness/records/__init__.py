"""Records of runs: what one holds, the files in which they lie, and traces; what of them goes to others."""
