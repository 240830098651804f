"""One decoder for all families, and its parts."""
