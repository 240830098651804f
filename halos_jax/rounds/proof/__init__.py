"""The samples of a round are its policy's: fingerprints of what drew them, and re-scoring."""
