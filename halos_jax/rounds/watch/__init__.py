"""The vital signs of a round: what is watched, and when it is measured."""
