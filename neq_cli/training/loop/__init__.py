"""The loop over batches and epochs: steps, optimisers, tasks, checkpoints."""
