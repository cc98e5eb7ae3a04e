"""Text and sentence pairs: from files or the Hub to tokens, and from tokens to batches."""
