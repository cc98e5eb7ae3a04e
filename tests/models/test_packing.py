"""Packed rows: every document starts from a zero state, for each way in which a collator marks the starts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import assert_same, gradients, random_ids, tiny_gnmt, tiny_lm
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

from moe_hf import LstmMoeConfig, LstmMoeForCausalLM
from moe_hf.models.packing import document_starts, lay_out

DOCUMENTS = [[3, 9, 4, 11, 5], [8, 6, 10, 3, 12, 4], [7, 7], [9], [5, 3, 4]]
COEFS = {"importance_loss_coef": 0.3, "load_loss_coef": 0.2, "gating": "softmax_top_k"}


def flattened(documents, **options):
    """Returns the library collator's output for documents: one row of all documents, first labels -100."""
    rows = [{"input_ids": document} for document in documents]
    return dict(DataCollatorWithFlattening(return_position_ids=False, **options)(rows))


def told_by(name, documents):
    """The batch with the boundaries in one of the library's three ways."""
    if name == "position_ids":
        return dict(DataCollatorWithFlattening()([{"input_ids": document} for document in documents]))
    if name == "position_ids from 2":
        rows = [{"input_ids": document} for document in documents]
        return dict(DataCollatorWithFlattening(position_ids_start=2)(rows))
    return flattened(
        documents, **{"seq_idx": {"return_seq_idx": True}, "cu": {"return_flash_attn_kwargs": True}}[name]
    )


def apart(model, documents):
    """Loss of the documents in a padded batch, one a row."""
    longest = max(map(len, documents))
    ids = torch.tensor([document + [0] * (longest - len(document)) for document in documents])
    mask = torch.tensor([[1] * len(document) + [0] * (longest - len(document)) for document in documents])
    return model(ids, attention_mask=mask, labels=ids)


def test_two_packed_documents_have_the_loss_of_two_documents():
    torch.manual_seed(0)
    sizes = dict(vocab_size=23, hidden_size=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    config = LstmMoeConfig(
        **sizes, dropout=0.0, gating="softmax_top_k", initializer_range=1.0, pad_token_id=0, eos_token_id=0
    )
    model = LstmMoeForCausalLM(config).double().eval()
    assert model(**told_by("position_ids", DOCUMENTS[:2])).loss.item() == pytest.approx(17.746, abs=5e-4)


@pytest.mark.parametrize("changes", [{}, {"lstm_hidden_size": 5}, {"layer_pattern": ["moe", "lstm"]}])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["position_ids", "position_ids from 2", "seq_idx", "cu"])
def test_packed_documents_have_loss_and_gradients_of_the_documents_apart(name, training, changes):
    model = tiny_lm(**COEFS, **changes).train(training)
    output, expected = model(**told_by(name, DOCUMENTS)), apart(model, DOCUMENTS)
    assert_same(output.loss, expected.loss)
    assert_same(output.aux_loss, expected.aux_loss)
    weights = dict(model.named_parameters())
    assert_same(gradients(output.loss, weights), gradients(expected.loss, weights))


@pytest.mark.parametrize("implementation", ["eager", "moe_hf"])
def test_packing_in_float32_through_the_fused_kernels(implementation):
    model = tiny_lm(torch.float32, experts=implementation, **COEFS)
    documents = [random_ids(1, 6, seed=seed)[0].tolist() for seed in range(4)]  # equal lengths fill the lanes
    expected = torch.cat([model(torch.tensor([document])).logits for document in documents], dim=1)
    torch.testing.assert_close(model(**told_by("position_ids", documents)).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_first_token_of_a_document_is_not_predicted_from_another():
    model, batch = tiny_lm(), told_by("position_ids", DOCUMENTS)
    loss = model(**batch).loss
    assert torch.equal(model(**(batch | {"labels": batch["input_ids"]})).loss, loss)
    following = torch.nn.functional.pad(batch["input_ids"][:, 1:], (0, 1), value=-100)
    assert torch.equal(model(**(batch | {"labels": None}), shift_labels=following).loss, loss)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_around_packed_documents_changes_nothing(side):
    model = tiny_lm(**COEFS).train()
    left, right = side != "right", side != "left"
    rows = [[DOCUMENTS[0], DOCUMENTS[2]], [DOCUMENTS[1]], [DOCUMENTS[4], DOCUMENTS[3], DOCUMENTS[2]], []]
    ids, mask, positions = (torch.zeros(len(rows), 11, dtype=torch.long) for _ in range(3))
    for row, documents in enumerate(rows):
        flat = sum(documents, [])
        start = (11 - len(flat)) // 2 if left and right else 11 - len(flat) if left else 0
        here = slice(start, start + len(flat))
        ids[row, here], mask[row, here] = torch.tensor(flat, dtype=torch.long), 1
        positions[row, here] = torch.tensor([i for document in documents for i in range(len(document))], dtype=int)
    output = model(ids, attention_mask=mask, position_ids=positions, labels=ids)
    expected = apart(model, [document for documents in rows for document in documents])
    assert_same(output.loss, expected.loss)
    assert_same(output.aux_loss, expected.aux_loss)
    weights = dict(model.named_parameters())
    assert_same(gradients(output.loss, weights), gradients(expected.loss, weights))


def test_left_padding_with_its_positions_is_no_packing():
    model, ids = tiny_lm(), random_ids(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = model(ids, attention_mask=mask)
    for padding in (0, 1):  # the value that generate() writes for padding
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, padding)
        output = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        assert torch.equal(output.logits, expected.logits)
    assert torch.equal(model(ids, position_ids=torch.arange(5)[None]).logits, model(ids).logits)


def test_a_hole_in_the_mask_is_no_boundary():
    model, ids, mask = tiny_lm(), random_ids(1, 5), torch.tensor([[1, 1, 0, 1, 1]])
    positions = torch.tensor([[0, 1, 0, 2, 3]])  # the positions that generate() derives from the mask
    output = model(ids, attention_mask=mask, position_ids=positions, labels=ids, use_cache=True)
    expected = model(ids, attention_mask=mask, labels=ids)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    new = model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)[:, 5]
    assert new == expected.logits[0, -1].argmax()


def test_a_state_and_packed_documents_are_refused_together():
    model, batch = tiny_lm(), told_by("position_ids", DOCUMENTS)
    message = "do not share a state: only past_key_values=None and use_cache=False are allowed"
    for arguments in ({"past_key_values": DynamicCache(config=model.config)}, {"use_cache": True}):
        with pytest.raises(ValueError, match=message):
            model(**batch, **arguments)


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ({"position_ids": torch.zeros(3, 4)}, r"position_ids has shape \(3, 4\), expected \(2, 4\)"),
        ({"seq_idx": torch.zeros(2, 3)}, r"seq_idx has shape \(2, 3\), expected \(2, 4\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, r"cu_seq_lens_q=\[0, 4\] must end with the length of one row"),
    ],
)
def test_boundaries_of_another_shape_are_refused(boundaries, message):
    with pytest.raises(ValueError, match=message):
        tiny_lm()(random_ids(2, 4), **boundaries)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), one_a_lane=st.booleans())
def test_lanes_hold_every_document_once_and_whole(data, one_a_lane):
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 12))
    bits = st.lists(st.booleans(), min_size=length, max_size=length)
    starts = torch.tensor([[False, *data.draw(bits)[1:]] for _ in range(rows)])
    mask = torch.tensor([data.draw(bits) for _ in range(rows)]) if data.draw(st.booleans()) else None
    documents = []
    for row in range(rows):
        documents.append([])
        for position in range(length):
            if starts[row, position]:
                documents.append([])
            if mask is None or mask[row, position]:
                documents[-1].append(row * length + position)
    documents = [document for document in documents if document]
    num_rows = len({document[0] // length for document in documents})
    lanes = lay_out(starts, mask, one_a_lane)
    if lanes is None:
        assert len(documents) == num_rows
        return
    assert len(documents) > num_rows
    is_real = torch.ones_like(lanes.gather_NL, dtype=torch.bool) if lanes.mask_NL is None else lanes.mask_NL
    is_start = torch.zeros_like(is_real) if lanes.starts_NL is None else lanes.starts_NL.clone()
    assert not is_start[:, 0].any()
    found = []
    for places, real, new in zip(lanes.gather_NL.tolist(), is_real.tolist(), is_start.tolist()):
        assert real == sorted(real, reverse=True)  # padding is at the end of a lane
        pieces = []
        for place, is_there, is_new in zip(places, real, new):
            if is_there:
                pieces = [*pieces, [place]] if is_new or not pieces else [*pieces[:-1], [*pieces[-1], place]]
        found += pieces
        assert len(pieces) <= 1 or not one_a_lane
    assert sorted(found) == sorted(documents)
    assert lanes.gather_NL.shape[1] == max(map(len, documents))
    flat_places = lanes.place_BS.flatten()
    for place in sum(documents, []):
        assert lanes.gather_NL.flatten()[flat_places[place]] == place
    if not one_a_lane:  # documents share a lane wherever they fit
        lengths, longest = sorted(map(len, documents), reverse=True), lanes.gather_NL.shape[1]
        rooms = []
        for length_ in lengths:
            if rooms and max(rooms) >= length_:
                rooms[rooms.index(max(rooms))] -= length_
            else:
                rooms.append(longest - length_)
        assert len(lanes.gather_NL) == len(rooms)


def test_no_boundary_is_found_where_there_is_none():
    assert document_starts((2, 3), position_ids=torch.arange(3)[None]) is None
    assert document_starts((1, 3), seq_idx=torch.tensor([[4, 4, 4]])) is None
    assert document_starts((2, 1), position_ids=torch.tensor([[0], [0]])) is None
    assert document_starts((1, 3), cu_seq_lens=torch.tensor([0, 3])) is None
    starts = document_starts((1, 4), position_ids=torch.tensor([[0, 1, 0, 0]]), seq_idx=torch.tensor([[0, 0, 0, 1]]))
    assert starts.tolist() == [[False, False, True, True]]


@pytest.mark.slow
def test_the_plain_trainer_trains_on_packed_documents_as_on_padded_ones(tmp_path):
    documents = [random_ids(1, length, seed=length)[0].tolist() for length in (9, 2, 5, 3, 7, 4, 8, 6)]
    options = dict(use_cpu=True, report_to="none", disable_tqdm=True, max_steps=2, save_strategy="no", optim="sgd")
    options |= dict(learning_rate=0.1, train_sampling_strategy="sequential", per_device_train_batch_size=4)

    def padded(items):
        longest = max(len(item["input_ids"]) for item in items)
        ids = torch.tensor([item["input_ids"] + [0] * (longest - len(item["input_ids"])) for item in items])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}

    models = []
    for collator in (DataCollatorWithFlattening(return_seq_idx=True), padded):
        model = tiny_lm(**COEFS)
        rows = [{"input_ids": document} for document in documents]
        arguments = TrainingArguments(str(tmp_path), logging_steps=1, **options)
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)
        trainer.train()
        models.append((dict(model.named_parameters()), trainer.evaluate()["eval_loss"]))
    assert models[0][1] == pytest.approx(models[1][1], rel=1e-4)  # the balancing losses are in float32
    for name, weight in models[0][0].items():
        torch.testing.assert_close(weight, models[1][0][name], rtol=1e-4, atol=1e-6)


def test_packing_is_of_language_models_only():
    with pytest.raises(TypeError, match="unexpected keyword argument 'position_ids'"):
        tiny_gnmt()(torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]]), position_ids=torch.tensor([[0, 1]]))
