"""The decoder's step with recurrent feeding: compiled, it needs few launches and gives the same results."""

import re
from unittest import mock

import pytest
import torch
from tiny_models import assert_same, padded, random_ids, sentences, tiny_gnmt
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering

from moe_hf.models.gnmt_layers import AttentionLstmLayer, recurrent_projection

CALL = re.compile(r"^\s*(extern_kernels\.\w+|cpp_fused\w*)\(|= torch\.ops\.\w+\.\w+\.\w+\(", re.MULTILINE)


def step_arguments(layer, with_padding):
    batch, source_length, width = 3, 7, layer.width
    draw = torch.Generator().manual_seed(0)
    source, h, c = (
        torch.randn(*shape, width, generator=draw) for shape in ((batch, source_length), (batch,), (batch,))
    )
    project = recurrent_projection(layer.weight_ih[:, width:], layer.weight_hh, num_steps=5)
    masks = [torch.ones(batch, source_length).bool(), torch.ones(batch, 1).bool()] if with_padding else [None, None]
    gates_x, keys = torch.randn(batch, 4 * width, generator=draw), layer.attention.project_source(source)
    return gates_x, project, None, h, c, keys, source, *masks


def count_launches(function, *arguments) -> int:
    """Returns the kernels and library calls of a function's graph in inductor's CPU code, without building it."""
    written = []

    class Written(Exception):
        pass

    def stop(graph):
        written.append(graph.codegen()[0].value)
        raise Written

    torch.compiler.reset()
    patches = mock.patch.object(GraphLowering, "compile_to_module", stop)
    with patches, inductor_config.patch(force_disable_caches=True), pytest.raises(Exception, match="Written"):
        torch.compile(function, fullgraph=True)(*arguments)
    return len(CALL.findall(written[0].split("def call(")[-1]))


@pytest.mark.gpu_path
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning")
@pytest.mark.parametrize("attention_type", ["product", "additive"])
@torch.no_grad()
def test_a_step_takes_at_most_12_launches(attention_type):
    layer = tiny_gnmt(torch.float32, attention_type=attention_type).model.decoder.layers[0]
    assert 3 <= count_launches(layer._step, *step_arguments(layer, with_padding=True)) <= 12


@pytest.mark.parametrize("feeding", ["recurrent", "input"])
def test_the_compiled_step_gives_the_same_outputs_and_gradients(feeding, monkeypatch):
    """Compiles all positions except the first, which computes the keys; a second graph serves all further lengths."""
    model, graphs = tiny_gnmt(attention_feeding=feeding), []
    model.train()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compiled_step(layer, hidden_states):
        return torch.compile(layer._step, fullgraph=True, backend=backend)

    source, mask = padded(sentences(5, 3), 5)
    results = {}
    for is_compiled in (False, True):
        if is_compiled:
            torch.compiler.reset()
            monkeypatch.setattr(AttentionLstmLayer, "_compiled_step", compiled_step)
        for length in (4, 6, 9):
            torch.manual_seed(0)
            labels = random_ids(2, length).index_put((torch.tensor(0), torch.tensor(length - 1)), torch.tensor(-100))
            loss = model(input_ids=source, attention_mask=mask, labels=labels).loss
            results[is_compiled, length] = loss, *torch.autograd.grad(loss, list(model.parameters()))
    for length in (4, 6, 9):
        assert_same(results[True, length], results[False, length])
    assert len(graphs) <= 2


def test_a_step_is_compiled_on_cuda_alone():
    layer = tiny_gnmt().model.decoder.layers[0]
    assert layer._compiled_step(torch.zeros(2, 50, 8)) == layer._step
