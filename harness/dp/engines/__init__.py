"""Engines: the only rooms that see raw gradients or know of microbatches."""
