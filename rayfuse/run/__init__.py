"""A run from end to end."""
