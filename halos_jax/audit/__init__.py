"""Verify a workdir: its hashes, and what can be derived again from the files that it names."""
