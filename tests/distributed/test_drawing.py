"""New weights drawn in parts equal the whole bit by bit, on any number of processes; no process holds all experts."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import on_processes
from safetensors.torch import load_file
from tiny_models import GNMT, LM
from tiny_training import tiny_arguments
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from moe_hf import GnmtMoeForConditionalGeneration, LstmMoeConfig, LstmMoeForCausalLM
from moe_hf.distributed import drawing, sharded_writing
from moe_hf.distributed.sharding import distributed_config, shard_new_model

EVEN, ODD = {"hidden_size": 16, "moe_intermediate_size": 16}, {"hidden_size": 12, "moe_intermediate_size": 5}
CLASSES = {LM: LstmMoeForCausalLM, GNMT: GnmtMoeForConditionalGeneration}


@pytest.mark.parametrize("sizes", [EVEN, ODD, {"num_experts": 1, "num_experts_per_tok": 1, "hidden_size": 2}], ids=str)
@pytest.mark.parametrize("family", [LM, GNMT], ids=["lm", "gnmt"])
def test_parts_are_the_bits_of_the_whole(monkeypatch, family, sizes):
    monkeypatch.setattr(drawing, "PIECE", 64)
    build = partial(CLASSES[family], family.config(**sizes))
    torch.manual_seed(0)
    expected, random_state = build().state_dict(), torch.get_rng_state()
    torch.manual_seed(0)
    model, state = drawing.build_without_experts(build)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert state.keys() == expected.keys() - model.all_tied_weights_keys.keys()
    for name, values in state.items():
        whole = expected[name]
        if "experts" in name:
            assert isinstance(values, drawing.DrawnLater) and model.get_parameter(name).is_meta
            for start, stop in ((0, 1), (1, 4), (len(whole) - 1, len(whole))):
                rows = values[(slice(start, stop), slice(None), slice(0, whole.shape[2]))]
                assert torch.equal(rows, whole[start:stop]), name
            values = values[...]
        assert torch.equal(values, whole), name


SIZES = {"vocab_size": 23, "hidden_size": 64, "num_experts": 2048, "moe_intermediate_size": 256}
LARGE = LstmMoeConfig(**SIZES, layer_pattern=["lstm", "moe"])
EXPERT_BYTES = 2 * 2048 * 64 * 256 * 4
PROCESSES = 4


def memory_kept(field: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, the most since `forget_peak`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def make_and_save(folder, config):
    sharded_writing.MAX_FILE_SIZE = "150MB"
    args = tiny_arguments(folder, expert_parallel_size=-1)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory_kept("VmRSS")
    torch.manual_seed(args.process_index)  # only the first process's seed counts
    model = shard_new_model(partial(LstmMoeForCausalLM, config), distributed_config(args))
    Path(folder).mkdir(exist_ok=True)
    sharded_writing.write_weights(model, Path(folder))
    peak = memory_kept("VmHWM") - before
    if args.process_index == 0:
        model.config.save_pretrained(folder)
    return peak, all(isinstance(weight, DTensor) for weight in model.parameters())


@pytest.mark.distributed
def test_no_process_has_all_experts_at_start_or_end(tmp_path):
    for peak, is_sharded in on_processes(PROCESSES, make_and_save, tmp_path, LARGE):
        assert is_sharded and EXPERT_BYTES / PROCESSES < peak < 0.8 * EXPERT_BYTES
    torch.manual_seed(0)
    expected = LstmMoeForCausalLM(LARGE).state_dict()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == expected.keys() and len(set(index.values())) > 1
    for name, file in index.items():
        assert torch.equal(load_file(tmp_path / file)[name], expected[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())
