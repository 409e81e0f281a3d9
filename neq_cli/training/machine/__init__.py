"""The machine a run computes on: its device, cores and memory, and what makes a device fast."""
