"""Examples of earlier rounds that a round trains on once more."""
