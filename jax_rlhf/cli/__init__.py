"""The command line: flags, checks before a run, the run itself, and what is said at its end."""
