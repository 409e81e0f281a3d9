"""Trains recipes into run directories: start, record, pause, resume, end; where training and runs meet."""
