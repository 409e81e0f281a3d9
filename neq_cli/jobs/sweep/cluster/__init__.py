"""The runs of a sweep as jobs of a SLURM cluster, submitted by submitit, the extra `[slurm]`; one process a job.

A job outlives the sweep that submitted it, saves when it is preempted or its time is up, and is queued again.
"""
