"""What a model is made of: layers and their rows, the axis that counts neurons, one traced sample."""
