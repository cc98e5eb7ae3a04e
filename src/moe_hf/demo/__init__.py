"""The two demos, and the corpora that they generate."""
