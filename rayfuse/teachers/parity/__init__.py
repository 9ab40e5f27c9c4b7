"""Each teacher is tested before it is trusted: its serving path against a plain float32 forward."""
