"""`rayfuse prefer`: answers of teachers and pivot, judged, chosen, and written as rows."""
