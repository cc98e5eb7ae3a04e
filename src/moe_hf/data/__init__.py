"""Loads text and sentence pairs from files or the Hub, and turns them into tokens and batches."""
