"""A grid of runs from one command: expanded, checked whole, then trained by processes that know nothing of it."""
