"""Checkpoints of arrays: written by Orbax, verified, kept and pruned."""
