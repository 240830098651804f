"""What a run keeps on disk: files, hashes and manifests; and the signals that stop it."""
