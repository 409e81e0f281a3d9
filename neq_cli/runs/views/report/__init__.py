"""A report of runs: one page for people and figures for papers; needs matplotlib, the extra `[report]`."""
