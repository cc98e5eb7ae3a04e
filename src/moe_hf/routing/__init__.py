"""Analyses how a model's gates route a text, and writes a page about it."""
