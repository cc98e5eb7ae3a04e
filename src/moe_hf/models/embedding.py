"""The token embedding, whose output can be scaled."""

import torch
from torch import nn

from .quantization import embedding


class TokenEmbedding(nn.Embedding):
    """ids (...) -> (..., D): rows of `weight` (vocab_size, D), times D ** 0.5 with `config.scale_embedding`.

    A matrix that is the softmax's too has to start small, with a variance of 1 / D; layers that start with gates and
    attention scores near zero learn slowly from inputs as small as that.

    Args:
        config: vocab_size, hidden_size D, scale_embedding.
    """

    def __init__(self, config):
        super().__init__(config.vocab_size, config.hidden_size)
        # Under this name the library has it elsewhere, and adapters on an embedding look for it.
        self.embed_scale = config.hidden_size**0.5 if config.scale_embedding else 1.0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return embedding(input_ids, self.weight) * self.embed_scale
