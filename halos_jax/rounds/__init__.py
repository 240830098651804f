"""What a round of the online loop consists of."""
