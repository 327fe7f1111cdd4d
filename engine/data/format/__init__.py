"""The latent shard format: writing, reading and verifying. It is described for other readers in docs/shards.md."""
