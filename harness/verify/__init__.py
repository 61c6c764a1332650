"""Evidence that a method does what its record will say."""
