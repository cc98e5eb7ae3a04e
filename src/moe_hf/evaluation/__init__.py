"""Metrics, tables and pictures that judge a trained model."""
