"""The code path through cuDNN, on a CPU: the arguments that cuDNN gets, and the operations that the compiler sees."""

import pytest
import torch
from cudnn_stand_in import cudnn_on_cpu
from device_path import device_path
from tiny_models import assert_same, gradients, randomize, tiny_lm_config
from torch._dynamo.backends.common import aot_autograd

from moe_hf.models import cudnn_lstm as module
from moe_hf.models.cudnn_lstm import _cudnn_lstm, cudnn_lstm
from moe_hf.models.lstm import Lstm, LstmLayer, row_lengths, run_lstm

UNITS = pytest.mark.parametrize("units", [None, 5])
MASK = torch.tensor([[False, True, True], [True, False, True], [True] * 3, [False] * 3])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(units, directions):
    lstms = [randomize(Lstm(tiny_lm_config(lstm_hidden_size=units)), seed).double() for seed in range(directions)]
    inputs = {"x": draw(4, 3, 8), "h": draw(directions, 4, 8, seed=1), "c": draw(directions, 4, units or 8, seed=2)}
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    weights = {f"{i}.{name}": value for i, lstm in enumerate(lstms) for name, value in lstm.named_parameters()}
    return lstms, inputs, weights


@pytest.fixture(autouse=True)
def untried():
    module.has_bfloat16.cache_clear()
    yield
    module.has_bfloat16.cache_clear()


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
@pytest.mark.parametrize("directions", [1, 2])
@UNITS
def test_outputs_states_and_all_gradients_are_those_of_our_kernel(units, directions, mask):
    lstms, inputs, weights = problem(units, directions)
    expected = run_lstm(inputs["x"], mask, inputs["h"], inputs["c"], lstms, True)
    wanted = gradients(sum(output.sin().sum() for output in expected), inputs | weights)
    for lengths in (None, None if mask is None else mask.sum(dim=1)):
        with cudnn_on_cpu():
            actual = run_lstm(inputs["x"], mask, inputs["h"], inputs["c"], lstms, True, lengths=lengths)
        assert_same(actual, expected)
        loss = sum(output.sin().sum() for output in actual)
        first = torch.autograd.grad(loss, list((inputs | weights).values()), retain_graph=True)
        assert_same(dict(zip(wanted, first)), wanted)
        assert_same(gradients(loss, inputs | weights), wanted)


def test_an_evaluating_layer_can_be_differentiated_and_keeps_nothing_without_gradients():
    layer, x = randomize(LstmLayer(tiny_lm_config())).double().eval(), draw(4, 3, 8)
    expected = gradients(layer(x)[0].sin().sum(), dict(layer.named_parameters()))
    weights = [layer.weight_ih, layer.weight_hh, layer.bias]
    state = x.new_zeros(1, 4, 8)
    with cudnn_on_cpu():
        assert_same(gradients(layer(x)[0].sin().sum(), dict(layer.named_parameters())), expected)
        with torch.no_grad():
            reserve, buffer = _cudnn_lstm(x, None, None, state, state, weights, False)[3:]
            layer.train()(x)  # no gradient will be asked for, so that nothing need be kept
    assert len(reserve) == len(buffer) == 0


@pytest.mark.parametrize("autocast_to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("knows_bfloat16", [True, False])
def test_autocast_means_bfloat16_or_float32_but_never_float16(autocast_to, knows_bfloat16, monkeypatch):
    if not knows_bfloat16:
        monkeypatch.setattr(module, "has_bfloat16", lambda device: False)
    layer, x = randomize(LstmLayer(tiny_lm_config()), std=0.3), draw(4, 3, 8).float()
    parameters = dict(layer.named_parameters())
    expected = layer(x)[0]
    wanted = gradients(expected.sin().sum(), parameters)
    with cudnn_on_cpu(), torch.autocast("cpu", dtype=autocast_to):
        outputs, h, c = layer(x)
        state = x.new_zeros(1, 4, 8)
        dtype = cudnn_lstm(x, None, None, state, state, [layer.weight_ih, layer.weight_hh, layer.bias])[0].dtype
    is_half = autocast_to == torch.bfloat16 and knows_bfloat16
    assert dtype == (torch.bfloat16 if is_half else torch.float32)
    assert {tensor.dtype for tensor in (outputs, h, c)} == {torch.float32}
    tolerance = {"rtol": 0, "atol": 0.3} if is_half else {"rtol": 1e-5, "atol": 1e-5}
    assert_same(outputs, expected, **tolerance)
    assert_same(gradients(outputs.sin().sum(), parameters), wanted, **tolerance)


def test_a_model_in_bfloat16_without_such_a_cudnn_computes_in_float32(monkeypatch):
    monkeypatch.setattr(module, "has_bfloat16", lambda device: False)
    layer, x = randomize(LstmLayer(tiny_lm_config()), std=0.3).bfloat16(), draw(4, 3, 8).bfloat16()
    with cudnn_on_cpu():
        outputs, h, c = layer(x, MASK)
    assert h.dtype == c.dtype == torch.bfloat16
    assert_same(outputs.float(), layer.float()(x.float(), MASK)[0], rtol=0.01, atol=0.01)


def test_bfloat16_is_tried_on_the_device_itself(monkeypatch):
    with cudnn_on_cpu():
        assert module.has_bfloat16(torch.device("cpu"))

    def refuse(*inputs):
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")

    module.has_bfloat16.cache_clear()
    monkeypatch.setattr(torch, "_cudnn_rnn", refuse)
    assert not module.has_bfloat16(torch.device("cpu"))


def test_one_padded_position_is_not_packed(monkeypatch):
    lstms, inputs, _ = problem(None, 1)
    mask = torch.tensor([[True], [False], [True], [False]])
    states = inputs["h"], inputs["c"]
    expected = run_lstm(inputs["x"][:, :1], mask, *states, lstms, True)
    monkeypatch.setattr(module, "pack_padded_sequence", None)
    with cudnn_on_cpu():
        assert_same(run_lstm(inputs["x"][:, :1], mask, *states, lstms, True), expected)


def test_lengths_are_read_where_cudnn_needs_them():
    assert row_lengths(MASK)[1] is None  # not on a CPU
    with device_path():
        mask, lengths = row_lengths(MASK)
        assert torch.equal(mask, MASK) and lengths.tolist() == [2, 2, 3, 0]
        assert row_lengths(torch.ones(2, 3, dtype=torch.bool)) == (None, None)
        assert row_lengths(MASK[:, :1])[1] is None and row_lengths(None) == (None, None)


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
def test_the_compiler_sees_one_operation_forward_and_one_backward(mask):
    layer, x = randomize(LstmLayer(tiny_lm_config())).double(), draw(4, 3, 8).requires_grad_()
    inputs = {"x": x} | dict(layer.named_parameters())
    graphs = []

    def record(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if "lstm" in str(node.target)])
        return graph

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    expected = layer(x, mask)[0]
    with cudnn_on_cpu():
        actual = torch.compile(layer, fullgraph=True, backend=backend)(x, mask)[0]
        actual_gradients = gradients(actual.sin().sum(), inputs)
    assert_same(actual, expected)
    assert_same(actual_gradients, gradients(expected.sin().sum(), inputs))
    assert [len(graph) for graph in graphs] == [1, 1]
