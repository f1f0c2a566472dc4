"""The commands: one module each. They parse arguments, call services, print, and return an exit code."""
