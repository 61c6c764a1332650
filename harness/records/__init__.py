"""What is known of runs: their records and traces, read and made ready for others."""
