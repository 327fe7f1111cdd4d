"""From shards to batches: which sample stands where, and micro-batches ahead of time."""
