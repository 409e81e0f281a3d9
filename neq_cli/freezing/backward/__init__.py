"""Fewer gradients: swapped classes, sliced kernels, and which of them is chosen."""
