"""Teachers as elastic Ray Serve applications."""
