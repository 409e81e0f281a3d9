"""From files to batches: what recipes name, opened, prepared, kept and shuffled."""
