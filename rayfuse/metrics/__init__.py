"""What a run measures: the metrics, their records, and the line on the terminal."""
