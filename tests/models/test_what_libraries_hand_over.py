"""Both families use or refuse each argument that the Trainer, generate() and other libraries pass to a forward."""

import pytest
import torch
from tiny_models import assert_same, gradients, tiny_gnmt, tiny_lm
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration, LstmMoeConfig, LstmMoeForCausalLM
from moe_hf.models.cache import CACHE_NAME, cache_of

TEXT = torch.tensor([[3, 9, 4, 11, 5, 7], [8, 6, 10, 3, 12, 4]])
TARGET = torch.tensor([[5, 9, 7, 2], [6, 8, 10, 2]])
SHIFTED = torch.tensor([[1, 5, 9, 7], [1, 6, 8, 10]])
SIZES = dict(vocab_size=23, hidden_size=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, dropout=0.0)
SIZES |= dict(gating="softmax_top_k", initializer_range=1.0, pad_token_id=0)
OPTIONS = dict(use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1, save_strategy="no", logging_steps=1)


def language_model(**config):
    torch.manual_seed(0)
    return LstmMoeForCausalLM(LstmMoeConfig(**SIZES, eos_token_id=0, **config))


def translator(**config):
    torch.manual_seed(0)
    special = dict(bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    return GnmtMoeForConditionalGeneration(GnmtMoeConfig(**SIZES, **special, **config))


def with_labels(family):
    """A model with balancing losses, and a batch with labels."""
    coefs = {"importance_loss_coef": 1.0, "load_loss_coef": 1.0}
    if family == "lstm_moe":
        return tiny_lm(gating="softmax_top_k", **coefs), {"input_ids": TEXT, "labels": TEXT}
    model = tiny_gnmt(gating="softmax_top_k", **coefs)
    return model, {"input_ids": TEXT, "labels": TARGET, "decoder_input_ids": SHIFTED}


FAMILIES = pytest.mark.parametrize("family", ["lstm_moe", "gnmt_moe"])


@FAMILIES
def test_an_unknown_keyword_is_a_type_error(family):
    model, batch = with_labels(family)
    for part in (model, model.model):
        inputs = batch if part is model else {name: batch[name] for name in batch if name != "labels"}
        with pytest.raises(TypeError, match=r"forward\(\) got an unexpected keyword argument 'atention_mask'"):
            part(**inputs, atention_mask=None)
    with pytest.raises(TypeError, match="'past_key_value'"):
        model(**batch, past_key_value=None)


def test_a_language_model_has_no_attentions_to_return():
    with pytest.raises(ValueError, match="output_attentions=True: this model does not use attention"):
        tiny_lm()(TEXT, output_attentions=True)


@FAMILIES
def test_the_cache_has_either_name(family):
    model, batch = with_labels(family)
    ids = "input_ids" if family == "lstm_moe" else "decoder_input_ids"
    batch = {name: batch[name] for name in batch if name != "labels"}
    expected = model(**batch).logits
    for name in ("past_key_values", "cache"):
        first = model(**(batch | {ids: batch[ids][:, :2]}), use_cache=True)
        rest = model(**(batch | {ids: batch[ids][:, 2:]}), **{name: cache_of(first)})
        assert_same(rest.logits, expected[:, 2:])
        assert cache_of(rest) is cache_of(first) is rest[CACHE_NAME]
    both = {"past_key_values": cache_of(model(**batch, use_cache=True)), "cache": cache_of(first)}
    with pytest.raises(ValueError, match="past_key_values and cache are two names of one argument"):
        model(**batch, **both)


@FAMILIES
@pytest.mark.parametrize("num_items", [None, 0, 6, torch.tensor(0), torch.tensor(6)])
@pytest.mark.parametrize("changes", [{}, {"loss_chunk_size": 2}, {"num_sampled": 6}, {"label_smoothing": 0.1}])
def test_a_batch_without_a_scored_token_has_loss_zero_and_no_gradient(family, num_items, changes):
    if family == "gnmt_moe" and not changes.keys() <= {"label_smoothing"}:
        changes = {}
    model, batch = with_labels(family)
    for name, value in changes.items():
        setattr(model.config, name, value)
    empty = batch | {"labels": torch.full_like(batch["labels"], -100)}
    loss = model.train()(**empty, num_items_in_batch=num_items).loss
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.eval()(**empty).loss == 0


def test_a_text_of_one_token_is_no_nan():
    for changes in ({}, {"loss_chunk_size": 2}, {"num_sampled": 6}):
        model = tiny_lm(**changes).train()
        loss = model(TEXT[:1, :1], labels=TEXT[:1, :1]).loss
        loss.backward()
        assert loss == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@FAMILIES
def test_the_plain_trainer_survives_a_batch_without_a_scored_token(family, tmp_path):
    model, batch = with_labels(family)
    model = model.float()
    rows = [{name: ids[0] for name, ids in batch.items()} | {"labels": torch.full_like(batch["labels"][0], -100)}]
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **OPTIONS), train_dataset=rows)
    trainer.train()
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert trainer.state.log_history[0]["loss"] == 0


@pytest.mark.slow
@FAMILIES
@pytest.mark.parametrize("labels_alone", [False, True])
def test_label_smoothing_of_the_trainer_is_refused_before_the_first_step(family, labels_alone, tmp_path):
    model, batch = with_labels(family)
    if labels_alone:
        batch.pop("decoder_input_ids", None)
    rows = [{name: ids[row] for name, ids in batch.items()} for row in range(2)]
    model = model.float()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    arguments = Seq2SeqTrainingArguments(str(tmp_path), label_smoothing_factor=0.1, **OPTIONS)
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match="instead of the Trainer's label_smoothing_factor, set label_smoothing"):
            run()
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "batch", "expected"),
    [
        (language_model, {"input_ids": TEXT, "labels": TEXT}, 17.145),
        (translator, {"input_ids": TEXT, "labels": TARGET, "decoder_input_ids": SHIFTED}, 17.422),
        (translator, {"input_ids": TEXT, "labels": TARGET}, 17.422),
    ],
)
def test_label_smoothing_of_the_model_is_the_plain_trainers_loss(model, batch, expected, tmp_path):
    coefs = {} if model is language_model else {"importance_loss_coef": 1.0, "load_loss_coef": 1.0}
    model = model(label_smoothing=0.1, **coefs)
    rows = [{name: ids[row] for name, ids in batch.items()} for row in range(2)]
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **OPTIONS), train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_smoothed_chunks_have_the_loss_and_gradients_of_all_logits(chunk_size):
    labels = TEXT.masked_fill(TEXT == 4, -100)
    results = []
    for size in (None, chunk_size):
        model = tiny_lm(label_smoothing=0.2, gating="softmax_top_k", loss_chunk_size=size).train()
        loss = model(TEXT, labels=labels).loss
        results.append((loss, gradients(loss, dict(model.named_parameters()))))
    assert_same(*results)
    model = tiny_lm(gating="softmax_top_k").train()
    log_probs = model(TEXT).logits[:, :-1].log_softmax(-1).double()
    nats = torch.stack(
        [
            -0.8 * row[label] - 0.2 * row.mean()
            for row, label in zip(log_probs.flatten(0, 1), labels[:, 1:].flatten())
            if label != -100
        ]
    )
    assert_same(results[0][0].double(), nats.mean() + model(TEXT, labels=labels).aux_loss.double(), rtol=1e-6)


def test_smoothing_needs_the_full_softmax():
    with pytest.raises(Exception, match="label_smoothing=0.1 needs the full softmax; with num_sampled=6"):
        LstmMoeConfig(vocab_size=23, num_sampled=6, label_smoothing=0.1)


@pytest.mark.slow
def test_a_loss_func_of_the_trainer_says_that_it_adds_the_balancing_losses(tmp_path):
    model, batch = with_labels("lstm_moe")
    model = model.float()
    rows = [{name: ids[row] for name, ids in batch.items()} for row in range(2)]

    def loss_func(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        nats = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return nats / num_items_in_batch + outputs.aux_loss

    losses = []
    for function in (None, loss_func):
        model.accepts_loss_kwargs = function is None
        arguments = TrainingArguments(str(tmp_path), learning_rate=0.0, **OPTIONS)
        trainer = Trainer(model, arguments, train_dataset=rows, compute_loss_func=function)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    model.accepts_loss_kwargs = True
    with pytest.raises(
        ValueError, match="with a compute_loss_func that adds outputs.aux_loss itself, set model.accepts"
    ):
        Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss_func).train()


def test_a_label_that_is_not_scored_masks_no_input_of_the_decoder():
    model, labels = translator().eval(), TARGET.clone()
    labels[:, :2] = -100
    assert model(TEXT, labels=labels, decoder_input_ids=SHIFTED).loss.item() == pytest.approx(11.764, abs=5e-4)


@pytest.mark.parametrize("scored", [[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]])
@pytest.mark.parametrize("start", [1, 0, 2])  # a separate start token, the padding, the end of sentence
def test_unscored_labels_are_read_and_routed_as_without_labels(scored, start):
    model = tiny_gnmt(gating="softmax_top_k", decoder_start_token_id=start)
    inputs = SHIFTED.masked_fill(SHIFTED == 1, start)
    labels = TARGET.masked_fill(torch.tensor([scored]) == 0, -100)
    output = model(TEXT, labels=labels, decoder_input_ids=inputs)
    free = model.model(TEXT, decoder_input_ids=inputs, output_statistics=True)
    log_probs = model.lm_head(free.last_hidden_state).log_softmax(-1)
    nats = [-log_probs[row, t, TARGET[row, t]] for row in range(2) for t in range(4) if scored[t]]
    assert_same(output.loss.double(), torch.stack(nats).mean(), rtol=1e-6)
    assert_same(output.aux_loss, free.aux_loss)


def test_padding_that_a_collator_leaves_behind_a_target_is_masked():
    model = tiny_gnmt(gating="softmax_top_k").train()
    labels = torch.tensor([[5, 9, 7, 2], [6, 2, -100, -100]])
    inputs = model.prepare_decoder_input_ids_from_labels(labels)
    given, alone = model(TEXT, labels=labels, decoder_input_ids=inputs), model(TEXT, labels=labels)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    masked = model(TEXT, labels=labels, decoder_input_ids=inputs, decoder_attention_mask=mask)
    assert torch.equal(given.loss, masked.loss) and torch.equal(alone.loss, masked.loss)


def test_a_hole_in_labels_alone_masks_nothing_around_it():
    model = tiny_gnmt(gating="softmax_top_k")
    labels = torch.tensor([[5, -100, 7, 2]])
    inputs = torch.tensor([[1, 5, 0, 7]])  # the token in the hole is unknown
    expected = model(TEXT[:1], labels=labels, decoder_input_ids=inputs, decoder_attention_mask=torch.ones(1, 4))
    assert torch.equal(model(TEXT[:1], labels=labels).loss, expected.loss)


@pytest.mark.parametrize("training", [True, False])
def test_logits_beside_a_chunked_loss_are_there_when_asked_for(training):
    model = tiny_lm(gating="softmax_top_k", loss_chunk_size=2).train(training)
    expected = model(TEXT).logits
    assert torch.equal(model(TEXT, labels=TEXT, skip_logits=False).logits, expected)
    assert model(TEXT, labels=TEXT, skip_logits=True).logits is None
    assert (model(TEXT, labels=TEXT).logits is None) == training
