"""Checkpoints of arrays: written by Orbax, verified, and pruned."""
