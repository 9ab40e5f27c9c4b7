"""Teachers in a vLLM engine."""
