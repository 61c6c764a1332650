"""Published privacy claims, recomputed from their settings."""
