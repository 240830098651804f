"""What follows from the end of a round: a verdict, the best round, a way back, an end."""
