"""The language model with `num_sampled` and `loss_chunk_size`: losses, logits, the Trainers, sharded heads."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_models import assert_same, gradients, random_ids, tiny_lm, tiny_lm_config
from tiny_training import ArrayStream, losses_of, noiseless_lm, tiny_trainer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moe_hf.data.windows import StreamWindows
from moe_hf.models.softmax_loss import SoftmaxHead, log_uniform_sample, sampled_softmax_loss

LABELS = random_ids(3, 5)
LABELS[1, 2] = -100
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])


@pytest.mark.parametrize("num_items_in_batch", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_chunked_loss_is_the_full_one(tied, training, num_items_in_batch):
    arguments = dict(attention_mask=MASK, labels=LABELS, num_items_in_batch=num_items_in_batch)
    results = []
    for chunk_size in (None, 4):
        model = tiny_lm(tie_word_embeddings=tied, gating="softmax_top_k", loss_chunk_size=chunk_size)
        output = model.train(training)(random_ids(3, 5), **arguments)
        assert (output.logits is None) == (training and chunk_size is not None)
        results.append((output.loss, gradients(output.loss, dict(model.named_parameters()))))
    assert_same(results[1][0].double(), results[0][0].double(), rtol=1e-6)  # the library's is in float32
    for name, grad in results[0][1].items():
        assert_same(results[1][1][name], grad, rtol=0, atol=2e-6 * grad.abs().max().item())


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_training_with_num_sampled_takes_the_sampled_loss(tied, chunk_size):
    model = tiny_lm(
        tie_word_embeddings=tied, gating="softmax_top_k", num_sampled=6, loss_chunk_size=chunk_size
    ).train()
    weights = dict(model.named_parameters())
    torch.manual_seed(3)
    output = model(random_ids(3, 5), labels=LABELS, num_items_in_batch=7)
    hidden = model.model(random_ids(3, 5)).last_hidden_state[:, :-1].flatten(0, 1)
    torch.manual_seed(3)
    sample = log_uniform_sample(6, 23)
    task = sampled_softmax_loss(hidden, model.lm_head.weight, LABELS[:, 1:].flatten(), *sample) / 7
    expected = task + output.aux_loss * (torch.tensor(11) / 7)  # 12 positions have a next token, one of them is -100
    assert output.logits is None
    assert_same(output.loss, expected)
    wanted = torch.autograd.grad(expected, list(weights.values()), retain_graph=True)  # both share aux_loss
    assert_same(gradients(output.loss, weights), dict(zip(weights, wanted)))


def test_evaluation_takes_the_full_softmax():
    model, plain, input_ids = tiny_lm(num_sampled=6), tiny_lm(), random_ids(3, 5)
    output, expected = model(input_ids, labels=input_ids), plain(input_ids, labels=input_ids)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.logits, expected.logits)


@pytest.mark.parametrize("training", [True, False])
def test_without_labels_there_are_logits(training):
    model, input_ids = tiny_lm(num_sampled=6, loss_chunk_size=4), random_ids(2, 3)
    assert model.train(training)(input_ids).logits.shape == (2, 3, 23)
    assert model.generate(input_ids, max_new_tokens=2, do_sample=False).shape == (2, 5)


@pytest.mark.parametrize("changes", [{"num_sampled": 6}, {"loss_chunk_size": 4}])
def test_a_batch_without_targets_has_loss_zero(changes):
    model = tiny_lm(importance_loss_coef=0.0, load_loss_coef=0.0, **changes).train()
    loss = model(random_ids(2, 3), labels=torch.full((2, 3), -100)).loss
    loss.backward()
    assert loss == 0 and all(p.grad.abs().max() == 0 for p in model.parameters() if p.grad is not None)


def test_saving_and_loading_keeps_both_values_and_the_head(tmp_path):
    tiny_lm(torch.float32, num_sampled=6, loss_chunk_size=4).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.num_sampled, loaded.config.loss_chunk_size) == (6, 4)
    assert type(loaded.lm_head) is SoftmaxHead


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_model_trains(tied):
    model = tiny_lm(torch.float32, num_sampled=6, tie_word_embeddings=tied)
    model.resize_token_embeddings(31, mean_resizing=False)
    assert type(model.lm_head) is SoftmaxHead and model.lm_head.weight.shape == (31, 8)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    input_ids = random_ids(2, 4, vocab_size=31)
    model.train()(input_ids, labels=input_ids).loss.backward()
    assert model.lm_head.weight.grad.shape == (31, 8)
    model.resize_token_embeddings(6)
    with pytest.raises(ValueError, match="num_sampled=6 must be at least 1 and below vocab_size=6"):
        model(random_ids(1, 3, vocab_size=6), labels=random_ids(1, 3, vocab_size=6))


def test_a_resized_softmax_is_not_initialised_again():
    model = tiny_lm(torch.float32)
    model.resize_token_embeddings(31)
    before = model.lm_head.weight.detach().clone()
    model.post_init()
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("num_sampled", [None, 6])
def test_the_plain_trainer_trains_evaluates_and_predicts(tmp_path, num_sampled, chunk_size):
    model = tiny_lm(torch.float32, num_sampled=num_sampled, loss_chunk_size=chunk_size)
    rows = [{"input_ids": row, "labels": row} for row in random_ids(5, 4)]
    options = dict(use_cpu=True, report_to="none", disable_tqdm=True, max_steps=2, save_strategy="no")
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, **options)
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {}

    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    expected_model = tiny_lm(torch.float32)
    expected_model.load_state_dict(model.state_dict())
    ids = random_ids(5, 4)
    expected = expected_model(ids, labels=ids).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    predictions = trainer.predict(rows).predictions
    trainer = Trainer(model, arguments, eval_dataset=rows, compute_metrics=compute_metrics)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    logits = expected_model(ids).logits.detach().numpy()
    for value in (predictions, seen[0]):
        np.testing.assert_allclose(value, logits, rtol=1e-4, atol=1e-5)


def trained_losses(folder, evaluate_with=None, learning_rate=0.5, **config):
    torch.manual_seed(0)
    data = StreamWindows(ArrayStream(4 * 8 * 20 + 1), 8, 4)
    trainer = tiny_trainer(
        noiseless_lm(torch.float32, **config), data, folder, eval_dataset=data, carry_state=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, per_device_eval_batch_size=4, num_train_epochs=1,
        learning_rate=learning_rate,
    )  # fmt: skip
    trainer.train()
    losses = losses_of(trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.model.config.loss_chunk_size = evaluate_with
    return losses, before, trainer.evaluate()["eval_loss"]


@pytest.mark.slow
def test_lm_trainer_trains_and_evaluates_alike_with_chunks(tmp_path):
    losses, loss, chunked = trained_losses(tmp_path, evaluate_with=5)
    others, other, _ = trained_losses(tmp_path, loss_chunk_size=3)
    assert others == pytest.approx(losses, rel=1e-4)
    assert chunked == pytest.approx(loss, rel=1e-6) and other == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_lm_trainer_learns_with_sampling_what_it_learns_without(tmp_path):
    _, full, _ = trained_losses(tmp_path)
    _, untrained, _ = trained_losses(tmp_path, learning_rate=0.0)
    _, sampled, _ = trained_losses(tmp_path, num_sampled=12)
    assert full < untrained - 0.1 and abs(sampled - full) < 0.02


@pytest.fixture
def one_process(tmp_path):
    """A mesh with only this process."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("changes", [{"num_sampled": 6}, {"loss_chunk_size": 4}])
def test_the_loss_finds_the_whole_weight_under_fsdp(one_process, changes):
    input_ids, losses = random_ids(2, 4), []
    for is_sharded in (False, True):
        model = tiny_lm(torch.float32, gating="softmax_top_k", **changes).train()
        if is_sharded:
            fully_shard(model.lm_head, mesh=one_process)
            assert hasattr(model.lm_head.weight, "device_mesh")
        torch.manual_seed(0)
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        grad = model.lm_head.weight.grad
        losses.append((loss.detach(), grad.full_tensor() if is_sharded else grad))
    assert_same(losses[1], losses[0])


def test_a_tensor_parallel_head_is_refused(one_process):
    model, input_ids = tiny_lm(torch.float32, loss_chunk_size=4), random_ids(2, 4)
    message = "lm_head is tensor parallel: only num_sampled=None and loss_chunk_size=None are allowed"
    parallelize_module(model.lm_head, one_process, ColwiseParallel())
    with pytest.raises(ValueError, match=message):
        model(input_ids, labels=input_ids)
    model.lm_head.weight = torch.nn.Parameter(
        torch.zeros(12, 8)
    )  # what the library gives to a forward without gradients
    with pytest.raises(ValueError, match=message):
        model.lm_head.forward(torch.zeros(1, 8), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sampled": 23}, "num_sampled=23 must be below vocab_size=23"),
        ({"num_sampled": 100}, "num_sampled=100 must be below vocab_size=23"),
        ({"num_sampled": 0}, "num_sampled=0 must be at least 1"),
        ({"loss_chunk_size": 0}, "loss_chunk_size=0 must be at least 1"),
    ],
)
def test_an_impossible_value_is_refused_by_name(changes, message):
    with pytest.raises(Exception, match=message):
        tiny_lm_config(**changes)
