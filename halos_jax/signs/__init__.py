"""The vital signs of a run: what fresh samples, their rewards and the policies say."""
