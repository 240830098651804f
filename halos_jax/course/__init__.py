"""The course of a run: what its signs mean, and what it decides by itself."""
