"""Questions about whole runs, of one process and of several."""
