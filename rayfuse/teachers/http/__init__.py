"""The teachers of a run, asked by people over HTTP."""
