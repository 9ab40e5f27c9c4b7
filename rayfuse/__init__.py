"""rayfuse: several expert language models with different tokenizers, fused into one student, on Ray."""

__version__ = "0.1.0"
