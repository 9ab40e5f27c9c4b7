"""From units of samples and the teachers' signals to the batches that a student trains on."""
