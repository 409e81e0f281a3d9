"""From a recipe to a run: models, data, optimisers, tasks and the loop; uses `freezing`, knows nothing of screens."""
