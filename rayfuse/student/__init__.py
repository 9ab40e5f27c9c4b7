"""The student: its engine (one file per engine), its checkpoints, and the group of Ray Train workers that trains it."""
