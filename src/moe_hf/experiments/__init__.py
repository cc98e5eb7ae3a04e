"""The experiments behind docs/reproduction/: sweeps, baselines, and their reports."""
