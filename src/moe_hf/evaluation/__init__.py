"""Evaluates trained models: perplexity, BLEU, records and plots."""

from ..model_size import count_embedding_parameters, count_parameters, ops_per_timestep

__all__ = ["count_embedding_parameters", "count_parameters", "ops_per_timestep"]
