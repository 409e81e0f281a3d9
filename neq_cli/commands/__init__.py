"""The commands of `neq`, a file a verb: what it takes, what it calls, what it prints."""
