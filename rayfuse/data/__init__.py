"""From files to samples: rows, conversations, prompts, and their rendering by a model's own template."""
