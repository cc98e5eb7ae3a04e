"""Draws new weights in parts, with the same bits as the whole tensor, but only one part in memory.

On a CPU, torch draws a tensor's normal values in order, in blocks of 16. Consecutive pieces of whole blocks therefore
give the same values as the whole tensor. Each process draws all pieces and keeps only its own.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..models.experts import MoeExperts

BLOCK = 16
PIECE = 2**20  # values in memory at once


class DrawnLater:
    """Normal values that are drawn when a slice is read, with the interface of a slice of a safetensors file.

    Args:
        shape: shape of the whole tensor.
        dtype: dtype of its values.
        state: the generator's state before the first value.
        arguments: mean and standard deviation, as for `Tensor.normal_`.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, state: torch.Tensor, arguments: dict):
        self.shape, self.dtype, self.state, self.arguments = shape, dtype, state, arguments

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index) -> torch.Tensor:
        """Draw a slice; `index` is `...`, or a tuple of slices in which only the first may cut."""
        first, *others = [slice(None)] * len(self.shape) if index is ... else index
        if any(part.indices(size) != (0, size, 1) for part, size in zip(others, self.shape[1:])):
            raise NotImplementedError(f"only the first dimension can be cut, not {index}")
        start, stop, _ = first.indices(self.shape[0])
        drawn = torch.empty(max(0, stop - start), *self.shape[1:], dtype=self.dtype)
        flat, size = drawn.view(-1), math.prod(self.shape[1:])
        generator = torch.Generator().set_state(self.state)
        for begin, piece in draw_pieces(math.prod(self.shape), self.dtype, generator, **self.arguments):
            if begin >= stop * size:
                break
            low, high = max(begin, start * size), min(begin + len(piece), stop * size)
            if low < high:
                flat[low - start * size : high - start * size] = piece[low - begin : high - begin]
        return drawn


def draw_pieces(
    number: int, dtype: torch.dtype, generator: torch.Generator | None, **arguments
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (start, piece) of the values that `torch.empty(number).normal_()` would draw.

    Args:
        number: number of values.
        dtype: dtype of the values.
        generator: the generator; None: torch's default.
        **arguments (float): arguments of `Tensor.normal_`.
    """
    piece, begin = torch.empty(min(number, PIECE + BLOCK), dtype=dtype, device="cpu"), 0
    while begin < number:
        # The last piece has at least one block, because torch draws fewer values in another way.
        length = number - begin if number - begin < PIECE + BLOCK else PIECE
        yield begin, piece[:length].normal_(generator=generator, **arguments)
        begin += length


class _ExpertsLater(TorchFunctionMode):
    """Does not allocate tensors of some shapes, and records how to draw their values later."""

    def __init__(self, shapes: set[torch.Size]):
        super().__init__()
        self.shapes, self.drawn = shapes, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.empty and (args[0] if isinstance(args[0], tuple) else args) in self.shapes:
            return func(*args, **kwargs, device="meta")
        if func is nn.init.normal_ and kwargs["tensor"].is_meta:
            tensor, arguments = kwargs["tensor"], {name: kwargs[name] for name in ("mean", "std")}
            self.drawn[tensor] = DrawnLater(tensor.shape, tensor.dtype, torch.get_rng_state(), arguments)
            for _ in draw_pieces(tensor.numel(), tensor.dtype, None, **arguments):
                pass  # advances the generator, so that later values are the same
            return tensor
        return func(*args, **kwargs)


def build_without_experts(build: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, dict]:
    """Make a model whose experts do not have values yet.

    Args:
        build: function that makes the whole model, with the same values as in a single process.

    Returns:
        The model, with experts on the meta device, and its state {name: tensor}, with `DrawnLater` for experts.
    """
    with torch.device("meta"):
        modules = build().modules()
    experts = [parameter for module in modules if isinstance(module, MoeExperts) for parameter in module.parameters()]
    with _ExpertsLater({tuple(parameter.shape) for parameter in experts}) as mode:
        model = build()
    own = dict(model.named_parameters(remove_duplicate=False))
    names = model.state_dict().keys() - model.all_tied_weights_keys.keys()
    values = model.state_dict()
    return model, {name: mode.drawn.get(own.get(name), values[name]) for name in sorted(names)}
