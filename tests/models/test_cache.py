"""The LSTM state as a layer of a Transformers cache."""

import importlib.util

import pytest
import tiny_gnmt
import tiny_models
import torch
from tiny_models import tiny_config
from transformers import DynamicCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from moe_hf.models import cache as cache_module
from moe_hf.models.cache import LstmCacheLayer


def filled_cache(pattern=("lstm", "moe", "lstm"), batch=3):
    """A cache whose state names its row: h is the row's number, c ten times that."""
    cache = DynamicCache(config=tiny_config(layer_pattern=pattern, lstm_hidden_size=6))
    for index, name in enumerate(pattern):
        if name == "lstm":
            rows = torch.arange(batch).float()[:, None] + 100 * index
            cache.update(rows.expand(-1, 8), 10 * rows.expand(-1, 6), index, num_tokens=4)
    return cache


def rows_of(cache, index=0):
    h, c = cache.layers[index].state
    assert torch.equal(h[:, 0] * 10, c[:, 0]) and h.shape[1] == 8 and c.shape[1] == 6
    return h[:, 0].tolist()


def test_dynamic_cache_builds_a_layer_per_lstm_and_none_for_moe():
    cache = DynamicCache(config=tiny_config(layer_pattern=["moe", "lstm", "lstm"]))
    assert [isinstance(layer, LstmCacheLayer) for layer in cache.layers] == [False, True, True]
    assert cache.layers[1].state == (None, None)
    assert cache.get_seq_length(1) == 0 and cache.layers[1].batch_size == -1


def test_positions_are_counted_and_the_state_replaced():
    cache = filled_cache()
    assert cache.get_seq_length() == 4 and cache.layers[0].batch_size == 3
    cache.update(torch.ones(3, 8), torch.ones(3, 6), 0)
    assert cache.get_seq_length() == 5 and cache.layers[0].get_mask_sizes(2) == (7, 0)
    assert cache.layers[0].state[0].shape == (3, 8) and cache.layers[0].state[0].eq(1).all()
    assert cache.layers[0].get_max_length() == -1


def test_beams_are_reordered_in_every_layer():
    cache = filled_cache()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert rows_of(cache) == [2, 0, 0] and rows_of(cache, 2) == [202, 200, 200]
    assert cache.get_seq_length() == 4


def test_rows_are_repeated_and_selected():
    cache = filled_cache(batch=2)
    cache.batch_repeat_interleave(2)
    assert rows_of(cache) == [0, 0, 1, 1]
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert rows_of(cache) == [1, 0] and rows_of(cache, 2) == [201, 200]


def test_an_empty_cache_may_be_reordered_repeated_and_selected():
    cache = DynamicCache(config=tiny_config())
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.layers[0].detach()
    assert cache.layers[0].state == (None, None)


def test_reset_forgets_everything_and_the_cache_can_be_used_again():
    cache = filled_cache()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.layers[0].state == (None, None)
    cache.update(torch.ones(2, 8), torch.ones(2, 6), 0, num_tokens=3)
    assert cache.get_seq_length() == 3 and cache.layers[0].batch_size == 2


def test_a_state_cannot_be_cropped():
    layer = filled_cache().layers[0]
    layer.crop(0)
    assert layer.get_seq_length() == 4
    for tokens_to_remove in (-1, 2):
        with pytest.raises(ValueError, match=f"tokens_to_remove={tokens_to_remove}"):
            layer.crop(tokens_to_remove)


def test_detach_cuts_the_gradient_and_keeps_the_values():
    layer = LstmCacheLayer()
    h, c = torch.ones(2, 8, requires_grad=True) * 3, torch.ones(2, 6, requires_grad=True) * 4
    layer.update(h, c)
    assert layer.state[0].requires_grad and layer.state[1].requires_grad
    layer.detach()
    assert not layer.state[0].requires_grad and not layer.state[1].requires_grad
    assert torch.equal(layer.state[0], h) and torch.equal(layer.state[1], c)


@pytest.mark.parametrize("models", [tiny_models, tiny_gnmt])
def test_another_copy_of_the_code_may_have_registered_its_class_later(models, monkeypatch):
    """As a repository does that brings its code, in the order of the imports."""
    model, ids = models.tiny_model(), torch.tensor([[3, 4, 5, 6]])
    expected = model.generate(ids, max_new_tokens=4, eos_token_id=None)
    monkeypatch.setitem(DYNAMIC_LAYER_TYPE_MAPPING, "lstm", LstmCacheLayer)  # restored afterwards
    spec = importlib.util.spec_from_file_location("another_copy", cache_module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert DYNAMIC_LAYER_TYPE_MAPPING["lstm"] is copy.LstmCacheLayer is not LstmCacheLayer
    assert torch.equal(model.generate(ids, max_new_tokens=4, eos_token_id=None), expected)
