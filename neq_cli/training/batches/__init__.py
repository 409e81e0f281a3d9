"""From prepared images to batches: shuffled, cached, read by worker processes, handed over."""
