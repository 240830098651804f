"""Policies: finding, loading and exporting them, and using them as a reference."""
