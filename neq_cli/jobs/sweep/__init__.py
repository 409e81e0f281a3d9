"""A grid of runs from one command: expanded, checked whole, then trained by processes that know nothing of it.

Ours, not Hydra's or Optuna's, which do not know from run directories what is finished and what is to go on.
"""
