"""Policies: found, loaded, used as a reference, exported."""
