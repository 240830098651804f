"""What a terminal or a log file sees of a run; everything else goes to files of the workdir."""
