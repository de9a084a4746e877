"""Files, paths and texts from untrusted sources, durable writes, and output to the terminal."""
