"""What lasts of a run: its files, their hashes, its manifests and the signals that stop it."""
