"""The command line: flags, checks before a run, the run itself, and the summary at its end."""
