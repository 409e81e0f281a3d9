"""The network a recipe names, with random weights or given ones."""
