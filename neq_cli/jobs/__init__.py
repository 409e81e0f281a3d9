"""A recipe trained into a run directory: started, recorded, paused, resumed, ended."""
