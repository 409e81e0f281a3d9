"""Rows that stand still around ``optimizer.step()``, whatever the optimiser."""
