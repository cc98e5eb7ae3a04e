"""Writes one complete model in the format of `save_pretrained`, to which every process writes its part.

A process never holds more than its part of a weight. All processes must see the folder.
"""

import json
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..models.factored_gradients import local

MAX_FILE_SIZE = "50GB"  # as in save_pretrained; a larger weight gets a separate file
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write model.safetensors, or several such files and their index. All processes must call it.

    Args:
        model: a model whose parameters are whole, or split along the first dimension.
        folder: an existing folder.

    Raises:
        OSError: a process cannot write. Every process raises this error.
    """
    weights = {k: v for k, v in get_model_state_dict(model).items() if k not in model.all_tied_weights_keys}
    shapes = {name: torch.empty(weight.shape, dtype=weight.dtype, device="meta") for name, weight in weights.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=MAX_FILE_SIZE)
    files = split.filename_to_tensors.items()
    headers = {file: _header({name: shapes[name] for name in names}) for file, names in files}
    with _failing_together():
        if dist.get_rank() == 0:
            for file, (header, _) in headers.items():
                (folder / file).write_bytes(header)
            if split.is_sharded:
                metadata = {"total_parameters": sum(shape.numel() for shape in shapes.values()), **split.metadata}
                index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
                text = json.dumps(index, indent=2, sort_keys=True) + "\n"
                (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
    with _failing_together():
        for file, (_, begins) in headers.items():
            with (folder / file).open("r+b") as opened:
                for name, begin in begins.items():
                    if (first := first_row(weights[name])) is not None:
                        part = local(weights[name]).cpu().contiguous()
                        opened.seek(begin + first * part.element_size() * math.prod(part.shape[1:]))
                        opened.write(part.view(-1).view(torch.uint8).numpy())


def first_row(weight: torch.Tensor) -> int | None:
    """Return the first row of this process in the whole weight; None if another process writes its rows."""
    if not isinstance(weight, DTensor):
        return 0 if dist.get_rank() == 0 else None
    first, number, mesh = 0, len(weight), weight.device_mesh
    # FSDP, whose mesh dimensions come first, has split the part that expert parallelism gave to a process.
    for dim in reversed(range(mesh.ndim)):
        rank = mesh.get_local_rank(dim)
        if weight.placements[dim].is_replicate():
            if rank:
                return None
            continue
        size = math.ceil(number / mesh.size(dim))
        first, number = first + rank * size, min(size, number - rank * size)
    return first if number > 0 else None


@contextmanager
def _failing_together() -> Iterator[None]:
    """Wait for all processes, and raise an error of one process on all, so that no process continues or hangs."""
    error, errors = None, [None] * dist.get_world_size()
    try:
        yield
    except OSError as caught:
        error = caught
    dist.all_gather_object(errors, error and (error.errno, error.strerror))
    if failed := next(filter(None, errors), None):
        raise OSError(*failed) from error


def _header(shapes: dict[str, torch.Tensor]) -> tuple[bytes, dict[str, int]]:
    """Return the header of a safetensors file, and the offset of each tensor's data."""
    entries, begins, end = {"__metadata__": {"format": "pt"}}, {}, 0
    for name, shape in shapes.items():
        begins[name], end = end, end + shape.nbytes
        entries[name] = {"dtype": DTYPES[shape.dtype], "shape": list(shape.shape), "data_offsets": [begins[name], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    start = struct.pack("<Q", len(text)) + text
    return start, {name: len(start) + begin for name, begin in begins.items()}
