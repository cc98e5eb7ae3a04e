"""Host reads on a GPU: fixed numbers for a training step and for a generated token."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from cudnn_stand_in import cudnn_on_cpu
from device_path import device_path
from host_reads_counter import counted_host_reads
from tiny_models import padded, random_ids, sentences, tiny_gnmt, tiny_lm

LIBRARY = ("__bool__", "generation/utils.py")  # whether all texts have ended
LENGTHS = ("cpu", "models/lstm.py")  # once for each stack, however many LSTMs it has
CHOSEN = ("nonzero", "models/moe.py")  # how many experts pass the thresholds
HIERARCHICAL = {"num_experts": 8, "num_expert_groups": 4, "num_experts_per_tok": 4}
STRICT = {"gating": "strictly_balanced"}
LAYERS = {"layer_pattern": ["lstm", "moe", "lstm", "moe", "lstm"]}
LM_CASES = {
    "noisy": {},
    "softmax": {"gating": "softmax_top_k"},
    "hierarchical": HIERARCHICAL,
    "strictly balanced": STRICT,
    "sampled": {"num_sampled": 6},
    "chunked": {"loss_chunk_size": 4},
    "projected": {"lstm_hidden_size": 16},
    "deep": LAYERS,
}
GNMT_CASES = {
    "recurrent": {},
    "input": {"attention_feeding": "input"},
    "parallel": {"attention_feeding": "parallel"},
    "additive": {"attention_type": "additive"},
    "hierarchical": HIERARCHICAL,
    "strictly balanced": STRICT,
}


@contextmanager
def as_on_a_gpu():
    with ExitStack() as stack:
        stack.enter_context(device_path())
        stack.enter_context(cudnn_on_cpu())
        yield stack.enter_context(counted_host_reads())


def reads_of_a_token(model, **inputs):
    """Returns the host reads per token: the reads of two more tokens, halved."""
    counts = []
    for num_tokens in (3, 5):
        with as_on_a_gpu() as reads:
            model.generate(**inputs, min_new_tokens=num_tokens, max_new_tokens=num_tokens, do_sample=False)
        counts.append(reads)
    return {key: (counts[1][key] - counts[0][key]) / 2 for key in counts[1] if counts[1][key] != counts[0][key]}


@pytest.mark.parametrize("case", LM_CASES)
def test_language_model(case):
    model, ids = tiny_lm(torch.float32, experts="grouped_mm", **LM_CASES[case]).train(), random_ids(3, 7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for attention_mask, expected in ((None, {}), (mask, {LENGTHS: 1}), (torch.ones_like(ids), {LENGTHS: 1})):
        with as_on_a_gpu() as reads:
            model(ids, attention_mask=attention_mask, labels=ids).loss.backward()
        assert reads == expected
    layers = LM_CASES[case].get("layer_pattern", []).count("moe") or 1
    chosen = {CHOSEN: layers} if case == "strictly balanced" else {}
    assert reads_of_a_token(model.eval(), input_ids=ids, attention_mask=mask) == {LIBRARY: 1} | chosen


@pytest.mark.parametrize("case", GNMT_CASES)
def test_translation_model(case):
    model = tiny_gnmt(torch.float32, experts="grouped_mm", **GNMT_CASES[case]).train()
    source, mask = padded(sentences(5, 3), 5)
    target, _ = padded(sentences(4, 2, seed=1), 4, value=-100)
    with as_on_a_gpu() as reads:
        model(input_ids=source, attention_mask=mask, labels=target).loss.backward()
    assert reads == {LENGTHS: 2}  # of the source and of the target
    chosen = {CHOSEN: 1} if case == "strictly balanced" else {}
    assert reads_of_a_token(model.eval(), input_ids=source, attention_mask=mask) == {LIBRARY: 1} | chosen


def test_the_counter_sees_what_waits():
    values, is_odd = torch.arange(4), torch.arange(4) % 2 == 1
    with counted_host_reads() as reads:
        int(values[0]), values.tolist(), bool(is_odd[1]), values[is_odd], is_odd.nonzero(), values.cpu().tolist()
    assert sorted(kind for kind, _ in reads.elements()) == ["__bool__", "__int__", "cpu", "index", "nonzero", "tolist"]
