"""Two sides against each other: tasks that compare."""
