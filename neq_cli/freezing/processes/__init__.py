"""The same frozen sets on every process, and gradients sent in part."""
