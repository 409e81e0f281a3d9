"""Runs before the eyes: drawn, in tables, live and as a page."""
