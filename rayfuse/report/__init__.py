"""What people read of a run: result table, report page and model card."""
