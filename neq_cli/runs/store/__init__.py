"""A run on disk: file names, the writer, the reader, the lock, and what is damaged."""
