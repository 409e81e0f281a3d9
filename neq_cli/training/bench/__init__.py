"""Training steps with and without frozen neurons, measured side by side: what `neq bench` reports."""
