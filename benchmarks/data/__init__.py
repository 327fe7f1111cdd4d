"""Questions about what stands between images and a step: encoding, shards, the loader."""
