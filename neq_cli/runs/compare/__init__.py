"""Numbers from runs: inspection, comparison, statistics."""
