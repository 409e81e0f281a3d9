"""Frozen rows stand still around ``optimizer.step()``, whatever the optimiser."""
