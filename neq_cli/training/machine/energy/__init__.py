"""What training takes in energy: a meter for each source, and the joules of all of them, row by row."""
