"""Runs, checkpoints and names of an earlier version, which every later version must reproduce (see ``make.py``)."""
