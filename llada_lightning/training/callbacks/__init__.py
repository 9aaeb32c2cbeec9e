"""Callbacks and loggers, one a file."""
