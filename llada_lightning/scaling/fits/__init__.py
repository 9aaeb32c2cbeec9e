"""Fits of validation loss against training FLOPs, and the ratio of compute between the two objectives."""
