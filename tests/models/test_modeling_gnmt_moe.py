"""The translation model against the per-position reference, outputs and gradients, with and without padding."""

import naive_gnmt
import pytest
import torch
from tiny_models import FEEDINGS, assert_same, gradients, padded, sentences, tiny_gnmt, tiny_gnmt_config

from moe_hf import GnmtMoeModel

VARIANTS = {
    "default": {},
    "scaled embedding": {"scale_embedding": True, "tie_word_embeddings": True},
    "additive": {"attention_type": "additive"},
    "projection": {"lstm_hidden_size": 12},
    "moe after the first layer": {"encoder_layer_pattern": ["lstm", "moe", "lstm"]},
    "one direction": {"encoder_bidirectional_first": False, "encoder_layer_pattern": ["moe", "lstm"]},
    "deep decoder": {"decoder_layer_pattern": ["lstm", "lstm", "moe", "lstm", "moe"]},
    "own embeddings": {"share_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "deep output": {"deep_output": True},
    "deep output, tied": {"deep_output": True, "tie_word_embeddings": True, "scale_embedding": True},
    "tied to the target's": {"tie_word_embeddings": True, "share_embeddings": False},
}
SIDES = pytest.mark.parametrize("side", ["none", "left", "right"])


def batch(side):
    """Sources and targets as lists, and the padded batch of them; the target's padding is on the same side."""
    lengths = ((4, 4, 4), (3, 3, 3)) if side == "none" else ((4, 1, 3), (3, 4, 1))
    sources, targets = sentences(*lengths[0]), sentences(*lengths[1], seed=1)
    padding = 0 if side == "none" else 1
    ids, mask = padded(sources, 4 + padding, side)
    decoder_ids, decoder_mask = padded(targets, max(lengths[1]) + padding, side)
    masks = {} if side == "none" else {"attention_mask": mask, "decoder_attention_mask": decoder_mask}
    return sources, targets, {"input_ids": ids, "decoder_input_ids": decoder_ids} | masks, mask, decoder_mask


@SIDES
@pytest.mark.parametrize("feeding", FEEDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_model_is_the_papers_with_all_gradients(variant, feeding, side):
    model = tiny_gnmt(attention_feeding=feeding, **VARIANTS[variant])
    sources, targets, inputs, mask, decoder_mask = batch(side)
    weights = dict(model.named_parameters())
    expected = naive_gnmt.translation_model(model.config, weights, sources, targets)
    output = model(**inputs, labels=torch.ones_like(inputs["decoder_input_ids"]), output_attentions=True)

    logits = torch.stack([step for row in expected.logits for step in row])
    actual = output.logits[decoder_mask.bool()]
    assert_same(actual, logits)
    assert_same(output.aux_loss.double(), expected.aux_loss, rtol=1e-6)
    (attention,) = output.cross_attentions
    assert attention.shape == (3, 1, decoder_mask.shape[1], mask.shape[1])
    for b, row in enumerate(expected.weights):
        real = attention[b, 0][decoder_mask[b].bool()]
        assert_same(real[:, mask[b].bool()], torch.stack(row))
        assert real[:, ~mask[b].bool()].eq(0).all()

    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs = {name: value for name, value in weights.items() if "noise_weight" not in name}
    assert len(inputs) >= 15
    assert_same(gradients((actual * probe).sum(), inputs | {}), gradients((logits * probe).sum(), inputs))


def test_a_source_that_is_all_padding_gets_no_attention_and_gives_finite_numbers():
    for feeding in FEEDINGS:
        model = tiny_gnmt(attention_feeding=feeding).train()
        (ids, mask), labels = padded(sentences(0, 3), 4), torch.tensor([[3, 4], [5, 6]])
        output = model(input_ids=ids, attention_mask=mask, labels=labels, output_attentions=True)
        assert output.cross_attentions[0][0].eq(0).all() and output.logits.isfinite().all()
        output.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("feeding", FEEDINGS)
def test_rows_of_a_padded_batch_equal_each_row_alone(feeding):
    model = tiny_gnmt(attention_feeding=feeding, lstm_hidden_size=12)
    for side in ("left", "right"):
        sources, targets, inputs, _, decoder_mask = batch(side)
        together = model(**inputs)
        for row in range(3):
            alone = model(input_ids=sources[row][None], decoder_input_ids=targets[row][None])
            assert_same(together.logits[row, decoder_mask[row].bool()], alone.logits[0])


def test_a_gate_sees_the_real_tokens_of_both_stacks_only():
    model, counts = tiny_gnmt(), []
    for stack in (model.model.encoder, model.model.decoder):
        block = next(layer for layer in stack.layers if hasattr(layer, "gate"))
        block.register_forward_hook(lambda module, args, output: counts.append(output[3].sum().item()))
    _, _, inputs, mask, decoder_mask = batch("left")
    model(**inputs, labels=inputs["decoder_input_ids"])
    assert counts == [2 * mask.sum(), 2 * decoder_mask.sum()]


def test_the_decoder_does_not_see_the_future():
    for feeding in FEEDINGS:
        model, (source,), (target,) = tiny_gnmt(attention_feeding=feeding), sentences(4), sentences(5, seed=1)
        changed = target.clone()
        changed[3] = (changed[3] + 1 - 3) % 20 + 3
        first, second = (model(input_ids=source[None], decoder_input_ids=t[None]).logits for t in (target, changed))
        assert_same(first[:, :3], second[:, :3])
        assert (first[:, 3:] - second[:, 3:]).abs().max() > 1e-3


def test_dropout_falls_on_embeddings_and_on_every_layers_output():
    model = tiny_gnmt(dropout=0.5).train()
    ids = torch.stack(sentences(30, 30))
    output = model(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True)
    for hidden in (output.encoder_hidden_states, output.decoder_hidden_states):
        assert 0.4 < hidden[0].eq(0).double().mean() < 0.6
    for hidden in (output.encoder_hidden_states[2:], output.decoder_hidden_states):
        for before, after in zip(hidden, hidden[1:]):
            assert 0.4 < (before == after).double().mean() < 0.6


def test_router_logits_and_hidden_states_are_recorded():
    model, (ids,) = tiny_gnmt(), sentences(4)
    plain = model(input_ids=ids[None], decoder_input_ids=ids[None, :3])
    for name in ("encoder_router_logits", "decoder_router_logits", "encoder_hidden_states", "cross_attentions"):
        assert getattr(plain, name) is None
    output = model(
        input_ids=ids[None], decoder_input_ids=ids[None, :3], output_router_logits=True, output_hidden_states=True
    )
    assert [x.shape for x in output.encoder_router_logits] == [(4, 5)]
    assert [x.shape for x in output.decoder_router_logits] == [(3, 5)]
    assert [x.shape for x in output.encoder_hidden_states] == [(1, 4, 8)] * 5
    assert [x.shape for x in output.decoder_hidden_states] == [(1, 3, 8)] * 4
    assert_same(model.lm_head(output.decoder_hidden_states[-1]), output.logits)
    assert torch.equal(output.encoder_last_hidden_state, output.encoder_hidden_states[-1])


@pytest.mark.parametrize("feeding", FEEDINGS)
def test_a_new_model_reads_inputs_of_unit_variance_and_attends_evenly(feeding):
    torch.manual_seed(0)
    model = GnmtMoeModel(
        tiny_gnmt_config(hidden_size=64, vocab_size=500, scale_embedding=True, attention_feeding=feeding)
    )
    ids = torch.randint(500, (4, 10))
    output = model.eval()(input_ids=ids, decoder_input_ids=ids, output_attentions=True)
    assert 0.9 < model.encoder.embed_tokens(ids).std() < 1.1
    assert (output.cross_attentions[0] - 0.1).abs().max() < 0.01
