"""TOML with line numbers: keys, types, and every problem of a file at once. Suites, claims and benchmarks use it."""
