"""Evidence that a method does what its record will say."""

from harness.verify.conformance import Check, check, repeated

__all__ = ["Check", "check", "repeated"]
