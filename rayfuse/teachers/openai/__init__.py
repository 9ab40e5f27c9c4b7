"""Teachers behind a completion server: no weights are shared."""
