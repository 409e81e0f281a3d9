"""A model is taken apart: its layers and their rows, the axis that counts neurons, one traced sample."""
