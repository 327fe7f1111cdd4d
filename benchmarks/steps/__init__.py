"""Questions about a training step: what it takes, what it waits for, and whether its numbers are the same."""
