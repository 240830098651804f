"""The tasks, one file for each kind of config.task, and what they share."""
