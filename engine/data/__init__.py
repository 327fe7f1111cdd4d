"""From source images to batches: source, transforms, shards, build, order, loader."""
