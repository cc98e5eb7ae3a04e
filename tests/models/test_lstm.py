"""The LSTM layer against the step-by-step reference, torch's own LSTM, and itself under padding and splitting."""

import naive_moe
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import assert_same, gradients, randomize, tiny_lm_config

from moe_hf.models.gnmt_layers import BidirectionalLstmLayer
from moe_hf.models.lstm import Lstm, LstmLayer, is_fused, run_fused, run_lstm
from moe_hf.models.lstm_kernel import _lstm, lstm_sequence

UNITS = pytest.mark.parametrize("units", [None, 5, 13])


def layer(units=None, seed=0, **changes):
    return randomize(LstmLayer(tiny_lm_config(lstm_hidden_size=units, **changes)), seed).double()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(batch, units, seed=5):
    return draw(batch, 8, seed=seed).requires_grad_(), draw(batch, units or 8, seed=seed + 1).requires_grad_()


@UNITS
@pytest.mark.parametrize("training", [True, False])
def test_layer_is_the_step_by_step_lstm_with_all_gradients(units, training):
    module, x = layer(units).train(training), draw(2, 4, 8).requires_grad_()
    h0, c0 = state(2, units)
    output, h, c = module(x, None, h0, c0)
    weights = dict(module.named_parameters())
    assert set(weights) == {"weight_ih", "weight_hh", "bias"} | ({"weight_hr"} if units else set())
    rows = [naive_moe.lstm_layer(list(x[b]), weights, h0[b], c0[b]) for b in range(2)]
    expected = torch.stack([torch.stack(outputs) for outputs, _, _ in rows])
    expected_h, expected_c = torch.stack([h for _, h, _ in rows]), torch.stack([c for _, _, c in rows])
    assert_same((output, h, c), (expected, expected_h, expected_c))
    probe = draw(2, 4, 8, seed=9)
    inputs = {"x": x, "h": h0, "c": c0, **weights}
    actual = gradients((output * probe).sum() + h.sin().sum() + c.cos().sum(), inputs)
    assert_same(actual, gradients((expected * probe).sum() + expected_h.sin().sum() + expected_c.cos().sum(), inputs))


@pytest.mark.parametrize("units", [None, 13])
def test_layer_is_torchs_lstm_with_a_zero_second_bias(units):
    module, x = layer(units), draw(3, 5, 8)
    reference = torch.nn.LSTM(8, units or 8, batch_first=True, proj_size=8 if units else 0).double()
    names = {
        "weight_ih_l0": "weight_ih",
        "weight_hh_l0": "weight_hh",
        "bias_ih_l0": "bias",
        "weight_hr_l0": "weight_hr",
    }
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(getattr(module, names[name]) if name in names else torch.zeros_like(parameter))
    expected, (h, c) = reference(x)
    assert_same(module(x), (x + expected, h[0], c[0]))


@UNITS
@settings(deadline=None, max_examples=6)
@given(cut=st.integers(1, 5), seed=st.integers(0, 999))
def test_a_sequence_in_two_parts_equals_one_pass(units, cut, seed):
    module, x = layer(units, seed), draw(2, 6, 8, seed=seed)
    output, h, c = module(x)
    first, middle_h, middle_c = module(x[:, :cut])
    second, last_h, last_c = module(x[:, cut:], None, middle_h, middle_c)
    assert_same((torch.cat([first, second], 1), last_h, last_c), (output, h, c))


@UNITS
@settings(deadline=None, max_examples=10)
@given(bits=st.lists(st.booleans(), min_size=15, max_size=15), seed=st.integers(0, 999), start=st.booleans())
def test_padding_anywhere_changes_neither_outputs_nor_states_nor_gradients(units, bits, seed, start):
    mask = torch.tensor(bits).view(3, 5)
    module, x = layer(units, seed), draw(3, 5, 8, seed=seed).requires_grad_()
    h0, c0 = state(3, units) if start else (None, None)
    output, h, c = module(x, mask, h0, c0)
    probe, expected_loss = draw(3, 5, 8, seed=seed + 1), 0
    loss = (output * probe)[mask].sum() + h.sin().sum() + c.cos().sum()
    for b in range(3):
        state_b = (h0[b : b + 1], c0[b : b + 1]) if start else (None, None)
        if mask[b].any():
            expected, expected_h, expected_c = module(x[b : b + 1, mask[b]], None, *state_b)
            assert_same(output[b, mask[b]], expected[0])
        else:
            zeros = (torch.zeros(1, 8).double(), torch.zeros(1, units or 8).double())
            expected, (expected_h, expected_c) = x.new_zeros(1, 0, 8), state_b if start else zeros
        assert_same((h[b], c[b]), (expected_h[0], expected_c[0]))
        expected_loss = expected_loss + (expected[0] * probe[b, mask[b]]).sum() + expected_h.sin().sum()
        expected_loss = expected_loss + expected_c.cos().sum()
    if mask.any():
        inputs = {"x": x, **dict(module.named_parameters())} | ({"h": h0, "c": c0} if start else {})
        actual = gradients(loss, inputs)
        assert_same(actual, gradients(expected_loss, inputs))
        assert (actual["x"][~mask] == 0).all()


@pytest.mark.parametrize("bits", [None, "011", "101"])
@pytest.mark.parametrize("directions", [1, 2])
@UNITS
def test_our_kernel_and_torchs_agree_with_all_gradients(units, directions, bits):
    """Covers torch's packed sequences, which only a GPU uses otherwise."""
    mask = None if bits is None else torch.tensor([[bit == "1" for bit in bits], [True] * 3, [False] * 3])
    lstms = [randomize(Lstm(tiny_lm_config(lstm_hidden_size=units)), seed).double() for seed in range(directions)]
    x = draw(3, 3, 8).requires_grad_()
    h, c = draw(directions, 3, 8, seed=1).requires_grad_(), draw(directions, 3, units or 8, seed=2).requires_grad_()
    inputs = {"x": x, "h": h, "c": c}
    inputs |= {f"{i}.{name}": value for i, lstm in enumerate(lstms) for name, value in lstm.named_parameters()}
    results = []
    for run in (run_lstm, run_fused):
        outputs = run(x, mask, h, c, lstms, True)
        assert outputs[0].shape == (3, 3, 8 * directions)
        results.append((outputs, gradients(sum(output.sin().sum() for output in outputs), inputs)))
    assert not is_fused(x, mask, lstms[0])
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])


def test_torchs_kernel_runs_whole_float32_sequences_without_a_projection():
    x, mask = torch.zeros(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    plain, projected = Lstm(tiny_lm_config()), Lstm(tiny_lm_config(lstm_hidden_size=12))
    assert is_fused(x, None, plain)
    assert not is_fused(x, mask, plain) and not is_fused(x[:, :1], None, plain) and not is_fused(x, None, projected)
    assert is_fused(x.to("meta"), mask, plain)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bits", [None, "011"])
@pytest.mark.parametrize("units", [8, 5])
def test_gradcheck_of_our_kernel(units, bits, reverse):
    lstm = randomize(Lstm(tiny_lm_config(lstm_hidden_size=units))).double()
    mask = None if bits is None else torch.tensor([[bit == "1" for bit in bits], [False, False, True]])
    h, c = state(2, units)

    def call(x, h, c, *weights):  # gradcheck changes the parameters in place
        return lstm_sequence(lstm, x, mask, h, c, reverse)

    assert torch.autograd.gradcheck(call, (draw(2, 3, 8).requires_grad_(), h, c, *lstm.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("units", [8, 5])
def test_our_kernel_is_one_operation_for_the_compiler(units):
    lstm = randomize(Lstm(tiny_lm_config(lstm_hidden_size=units))).double()
    h, c = state(2, units)
    weights = [*lstm.parameters(), *([None] if units == 8 else [])]
    mask = torch.tensor([[False, True, True], [True, True, True]])
    for starts in (None, torch.tensor([[False, True, False], [False, False, True]])):
        torch.library.opcheck(_lstm, (draw(2, 3, 8).requires_grad_(), mask, h, c, *weights, False, starts))


@pytest.mark.parametrize("layer_class", [LstmLayer, BidirectionalLstmLayer])
def test_float32_and_float64_agree_where_their_kernels_differ(layer_class):
    module, x = randomize(layer_class(tiny_lm_config()), std=0.3), draw(3, 6, 8)
    expected = module.double()(x)[0]
    assert_same(module.float()(x.float())[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_of_padding_keeps_its_state_exactly():
    module, x = layer(), draw(2, 3, 8)
    h0, c0 = state(2, None)
    _, h, c = module(x, torch.tensor([[False] * 3, [True] * 3]), h0, c0)
    assert torch.equal(h[0], h0[0]) and torch.equal(c[0], c0[0])
    assert not torch.equal(h[1], h0[1])


@pytest.mark.parametrize("units", [None, 6])
@pytest.mark.parametrize("mask", [None, torch.tensor([[True], [False], [True]])])
def test_one_position_without_gradients_gives_what_the_kernel_gives(units, mask):
    x, (h, c) = draw(3, 1, 8), state(3, units)
    with_gradients = layer(units)(x, mask, h, c)
    with torch.no_grad():
        assert_same(layer(units)(x, mask, h, c), tuple(output.detach() for output in with_gradients))


def test_dropout_falls_on_the_output_but_not_on_the_recurrence():
    module, x = layer(dropout=0.5), draw(2, 20, 8)
    expected, h, c = module.eval()(x)
    torch.manual_seed(0)
    output, dropped_h, dropped_c = module.train()(x)
    assert_same((dropped_h, dropped_c), (h, c))
    is_zero = (output - x).abs() < 1e-12
    assert 0.4 < is_zero.double().mean() < 0.6
    assert_same((output - x)[~is_zero], 2 * (expected - x)[~is_zero])


@pytest.mark.parametrize(
    "mask", [None, torch.tensor([[False, True, True], [True, True, True]])], ids=["full", "padded"]
)
@UNITS
def test_state_has_the_dtype_of_the_input_under_autocast(units, mask):
    module, x = layer(units).float(), draw(2, 3, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, h, c = module(x, mask)
    assert {output.dtype, h.dtype, c.dtype} == {torch.float32}
    expected, _, _ = module(x, None, *module(x, mask)[1:])
    continued, _, _ = module(x, None, h, c)
    assert_same(continued, expected, rtol=0, atol=0.05)


def test_a_state_of_another_batch_size_is_refused():
    module, x = layer(), draw(2, 3, 8)
    for mask in (None, torch.tensor([[False, True, True], [True, True, True]])):
        with pytest.raises(ValueError, match="h has 3 rows, hidden_states has 2"):
            module(x, mask, *state(3, None))
