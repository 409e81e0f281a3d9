"""From files to batches: what recipes name, opened, prepared, cached and shuffled."""
