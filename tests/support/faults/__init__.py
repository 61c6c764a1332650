"""More planted faults than `epsbench faults` runs: `wider` lists them, with the check that must catch each."""
