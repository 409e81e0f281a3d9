"""A grid of runs from one command: expanded, checked whole, then trained by processes that know nothing of it.

Ours, not Hydra's, which does not know from run directories what is finished and what is to go on. What a search trains
is chosen by optuna, and trained as a grid is.
"""
