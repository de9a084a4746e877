"""Files, paths and texts that others wrote, and the terminal."""
