"""Metrics, tables and pictures that judge a trained model."""

from .model_size import count_parameters, ops_per_timestep

__all__ = ["count_parameters", "ops_per_timestep"]
