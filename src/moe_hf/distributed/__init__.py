"""Models on several processes: sharding, sharded checkpoints, global-batch balancing, and a cost model."""
