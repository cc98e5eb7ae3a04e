"""The experiments of docs/reproduction.md: sweeps, baselines, and the reports on them."""
