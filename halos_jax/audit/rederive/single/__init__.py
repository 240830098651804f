"""The tasks without rounds, made again."""
