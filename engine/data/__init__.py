"""From source images to batches: sources, transforms, encode, format, samples."""
