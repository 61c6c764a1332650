"""The methods: one file each, found by `harness.registry`; they import the parts they are made of and nothing else."""
