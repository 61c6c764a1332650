"""Audits: attacks on real training runs, and the lower bounds on epsilon that follow from them."""
