"""A static cache keeps the addresses of its state, and generate() compiles a step with the cache as one graph."""

import pytest
import torch
from tiny_models import GNMT, LM, assert_same, padded, sentences, tiny_lm, tiny_lm_config
from transformers import CompileConfig, DynamicCache, StaticCache

from moe_hf.generation import gnmt_beam_search

FAMILIES = pytest.mark.parametrize("models", [LM, GNMT], ids=["lm", "gnmt"])


class Graphs(list):
    """A backend of torch.compile that runs each graph as it is, and keeps it."""

    def __call__(self, graph, inputs, **kwargs):
        self.append(graph)
        return graph

    def __deepcopy__(self, memo):  # the library copies a CompileConfig
        return self


def static_layer(batch=2):
    cache = StaticCache(config=tiny_lm_config(layer_pattern=["moe", "lstm"]), max_cache_len=9)
    cache.update(torch.arange(batch).float()[:, None].expand(-1, 8), torch.ones(batch, 8), 1, num_tokens=3)
    return cache, cache.layers[1]


def test_only_a_static_cache_is_compileable():
    cache, layer = static_layer()
    # Compares names: an earlier test may have loaded another copy of the code, whose classes the library then uses.
    assert type(layer).__name__ == "StaticLstmCacheLayer" and cache.is_compileable
    assert not DynamicCache(config=tiny_lm_config()).is_compileable


def test_a_static_state_is_written_over_in_place():
    cache, layer = static_layer()
    addresses = [part.data_ptr() for part in (*layer.state, layer.cumulative_length)]
    cache.update(torch.full((2, 8), 5.0), torch.full((2, 8), 6.0), 1)
    assert layer.state[0].eq(5).all() and layer.state[1].eq(6).all() and cache.get_seq_length(1) == 4
    layer.state[0][1] = 7.0
    cache.reorder_cache(torch.tensor([1, 1]))
    assert layer.state[0].eq(7).all()
    cache.reset()
    assert layer.state == (None, None) and cache.get_seq_length(1) == 0
    cache.update(torch.ones(2, 8), torch.ones(2, 8), 1, num_tokens=2)
    assert layer.state[0].eq(1).all() and cache.get_seq_length(1) == 2
    assert [part.data_ptr() for part in (*layer.state, layer.cumulative_length)] == addresses


def test_a_static_cache_takes_another_batch_after_a_reset():
    cache, layer = static_layer()
    cache.reset()
    cache.update(torch.ones(3, 8), torch.ones(3, 8), 1)
    assert layer.batch_size == 3 and layer.state[0].eq(1).all()


@FAMILIES
def test_a_step_of_generate_is_compiled_as_one_graph(models):
    """Also for a second text, whose cache is another one."""
    model, graphs = models.model(experts="moe_hf"), Graphs()
    ids, mask = padded(sentences(5, 3), 5, side="left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    torch.compiler.reset()
    config = CompileConfig(fullgraph=True, backend=graphs)
    for prompt in (ids, ids.flip(0)):
        expected = model.generate(prompt, **options)
        compiled = model.generate(prompt, compile_config=config, **options)
        assert torch.equal(compiled.sequences, expected.sequences)
        assert_same(torch.stack(compiled.logits), torch.stack(expected.logits))
    assert len(graphs) == 1
    assert not any(
        "segment_experts" in str(node.target) or "lstm" in str(node.target) for node in graphs[0].graph.nodes
    )


def test_a_step_of_gnmt_beam_search_is_compiled():
    model, graphs = GNMT.model(experts="moe_hf"), Graphs()
    ids, mask = padded(sentences(5, 3), 5)
    options = {"max_new_tokens": 6, "num_beams": 3, "custom_generate": gnmt_beam_search, "attention_mask": mask}
    options |= {"return_dict_in_generate": True}
    torch.compiler.reset()
    expected = model.generate(ids, **options)
    compiled = model.generate(ids, compile_config=CompileConfig(backend=graphs, fullgraph=True), **options)
    assert torch.equal(compiled.sequences, expected.sequences)
    assert_same(compiled.sequences_scores, expected.sequences_scores)
    assert len(graphs) == 1


def test_a_mask_that_grows_does_not_reach_a_step():
    model, ids = tiny_lm(), torch.ones(2, 4, dtype=torch.long)
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, attention_mask=torch.ones_like(ids))
    assert "attention_mask" not in inputs and inputs["input_ids"].shape == (2, 1)
    first = model.prepare_inputs_for_generation(ids, attention_mask=torch.ones_like(ids), is_first_iteration=True)
    assert first["attention_mask"].shape == (2, 4)
