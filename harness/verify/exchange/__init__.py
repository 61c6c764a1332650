"""Records from and for other laboratories: bundles, and what is computed again before a record is believed."""
