"""What moves on a terminal while a run or a sweep goes."""
