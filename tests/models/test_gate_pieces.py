"""The noisy gate of many experts, computed in pieces of the tokens, against plain torch."""

import pytest
import torch
from tiny_models import assert_same, gradients, randomize

from moe_hf.models import gate_pieces
from moe_hf.models.gating import NoisyTopKGate


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def run(monkeypatch):
    """The gate's output under the noise of a seed, in pieces of 16 tokens or whole."""
    monkeypatch.setattr(gate_pieces, "PIECE_LOGITS", 0)
    monkeypatch.setattr(gate_pieces, "MIN_TOKENS", 16)

    def run(gate, hidden, mask=None, in_pieces=True, **options):
        monkeypatch.setattr(gate_pieces, "MIN_LOGITS", 0 if in_pieces else 10**9)
        torch.manual_seed(7)
        return gate(hidden, mask, **options)

    return run


def gate_and_tokens(tokens=43, experts=18, k=3, dtype=torch.float64):
    gate = randomize(NoisyTopKGate(4, experts, k, noise_epsilon=0.05), 1).to(dtype)
    return gate, draw(2, tokens, 4).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pieces_decide_as_the_whole_does(run, dtype):
    """Also under autocast, and with the same random numbers: the next one is the same too."""
    gate, hidden = gate_and_tokens(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        whole, after_whole = run(gate, hidden, in_pieces=False), torch.rand(1)
        pieces, after_pieces = run(gate, hidden), torch.rand(1)
    assert torch.equal(pieces.top_k_index, whole.top_k_index) and torch.equal(after_pieces, after_whole)
    for actual, expected in zip(pieces, whole):
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [43, 48])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("k", [1, 3, 17])
@pytest.mark.filterwarnings("ignore:num_experts_per_tok=1")
def test_all_gradients_are_those_of_plain_torch(run, tokens, with_mask, k):
    gate, hidden = gate_and_tokens(tokens, k=k)
    mask = draw(3, tokens) > -0.5 if with_mask else None
    inputs = {"hidden": hidden, "weight": gate.weight, "noise": gate.noise_weight}
    probes = draw(4, tokens, k), draw(5, tokens, 18), draw(6, 18), draw(7, 18)

    def parts(output):
        values = output.top_k_weights, output.router_logits, output.importance, output.load
        return [(value * probe).sum() for value, probe in zip(values, probes)]

    for chosen in ([0, 1, 2, 3], [0, 1], [0], [3]):
        actual, expected = (
            gradients(sum(parts(run(gate, hidden, mask, in_pieces=in_pieces))[i] for i in chosen), inputs)
            for in_pieces in (True, False)
        )
        assert_same(actual, expected)


def test_the_backward_pass_keeps_the_two_logits_alone(run):
    gate, hidden = gate_and_tokens()
    kept = {True: set(), False: set()}
    for in_pieces, sizes in kept.items():

        def pack(tensor, sizes=sizes):
            if tensor.shape == (43, 18):
                sizes.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = run(gate, hidden, in_pieces=in_pieces)
        assert output.load.requires_grad
    assert len(kept[True]) == 2 < len(kept[False])


def test_a_gate_without_statistics_and_one_that_evaluates_need_no_pieces(run, monkeypatch):
    gate, hidden = gate_and_tokens()
    monkeypatch.setattr("moe_hf.models.gating.noisy_top_k_in_pieces", lambda *args: pytest.fail("in pieces"))
    run(gate, hidden, output_statistics=False)
    run(gate.eval(), hidden)
