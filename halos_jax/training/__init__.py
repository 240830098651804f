"""The optimizer's state, its step and the loop of steps."""
