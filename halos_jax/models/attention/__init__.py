"""Causal attention: backends, rotary positions and the view of packed rows."""
