"""Hashes of a whole run: the chain of its manifests, the certificate beside its weights."""
