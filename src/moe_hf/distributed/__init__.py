"""Models over several processes: shards, their checkpoints, balance over the global batch, and what it costs."""
