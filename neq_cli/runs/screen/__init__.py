"""What the dashboard draws: from the records so far to lines that fit a window of any size."""
