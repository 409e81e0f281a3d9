"""A search in place of a grid: optuna, the extra `[optuna]`, chooses what each next run of a sweep is trained with.

It looks for the front of the test metric against executed FLOPs: runs that no other is better than in both.
"""
