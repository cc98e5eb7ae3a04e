"""The experiments of docs/reproduction/: sweeps, baselines, and the reports on them."""
