"""The command line: flags, gin files, and what the terminal shows."""
