"""The method inside other people's training loops: a callback for each framework, imported by who uses it alone."""
