"""Reads TOML into typed tables, and reports every error with its line. Suites, claims and benchmarks use it."""
