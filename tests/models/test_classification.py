"""The language model as a classifier: the token read, losses by hand, loading, saving and training."""

import json

import pytest
import torch
from tiny_models import assert_same, random_ids, randomize, tiny_lm, tiny_lm_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers import pipeline as library_pipeline

from moe_hf import LstmMoeForSequenceClassification
from moe_hf.errors import InputError
from moe_hf.families import FAMILIES
from moe_hf.hub import with_code
from moe_hf.loading import load_pretrained

TEXTS = [[3, 9, 4, 11, 5], [7, 2], [8, 6, 10]]


def tiny_classifier(num_labels=3, seed=0, **changes):
    config = tiny_lm_config(**({"gating": "softmax_top_k", "num_labels": num_labels} | changes))
    return randomize(LstmMoeForSequenceClassification(config), seed).double().eval()


def padded(side, padding=0):
    length = max(map(len, TEXTS))
    rows = [(text, [padding] * (length - len(text))) for text in TEXTS]
    mask = [([1] * len(text), [0] * len(pad)) for text, pad in rows]
    order = (lambda real, pad: pad + real) if side == "left" else (lambda real, pad: real + pad)
    return torch.tensor([order(*row) for row in rows]), torch.tensor([order(*row) for row in mask])


def logits_of_single_texts(model):
    states = [model.model(torch.tensor([text])).last_hidden_state[0, -1] for text in TEXTS]
    return torch.stack(states) @ model.score.weight.T


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_the_last_real_token_is_read(side):
    model = tiny_classifier()
    ids, mask = padded(side, padding=5)  # a token that ends a text, too: the mask decides
    assert_same(model(ids, attention_mask=mask).logits, logits_of_single_texts(model))
    embeddings = model.get_input_embeddings()(ids)
    assert_same(model(inputs_embeds=embeddings, attention_mask=mask).logits, logits_of_single_texts(model))


@torch.no_grad()
def test_without_a_mask_the_padding_token_tells_where_a_text_ends():
    model = tiny_classifier()
    ids, _ = padded("right")
    assert_same(model(ids).logits, logits_of_single_texts(model))
    model.config.pad_token_id = None
    assert_same(model(ids[:1]).logits, logits_of_single_texts(model)[:1])
    with pytest.raises(ValueError, match="pad_token_id=None and attention_mask=None"):
        model(ids)


LOSSES = {
    "single label": (3, torch.tensor([2, 0, 1]), "single_label_classification"),
    "a row that is not scored": (3, torch.tensor([2, -100, 1]), "single_label_classification"),
    "several labels": (3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [0.5, 1, 0]]), "multi_label_classification"),
    "a number": (1, torch.tensor([0.5, -1.0, 2.0]), "regression"),
    "numbers": (2, torch.tensor([[0.5, -1.0], [2.0, 0.1], [-3.0, 0.0]]), "regression"),
}


def loss_by_hand(logits, labels, problem_type):
    """Returns the sum of the losses, and the number of summands."""
    if problem_type == "single_label_classification":
        scored = [(row, int(label)) for row, label in zip(logits, labels) if label != -100]
        return sum(row.exp().sum().log() - row[label] for row, label in scored), len(scored)
    labels = labels.double().view_as(logits)
    if problem_type == "regression":
        return ((logits - labels) ** 2).sum(), labels.numel()
    probability = 1 / (1 + (-logits).exp())
    return -(labels * probability.log() + (1 - labels) * (1 - probability).log()).sum(), labels.numel()


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("training", [True, False])
def test_losses_are_those_of_the_library_and_of_the_balance(case, training):
    num_labels, labels, problem_type = LOSSES[case]
    model = tiny_classifier(num_labels, importance_loss_coef=1.0).train(training)
    if case == "numbers":
        model.config.problem_type = problem_type  # the library would take them for probabilities
    ids, mask = padded("left")
    outputs = model(ids, attention_mask=mask, labels=labels)
    total, count = loss_by_hand(logits_of_single_texts(model), labels, problem_type)
    assert outputs.aux_loss > 0.01
    assert_same(outputs.loss, total / count + training * outputs.aux_loss)
    assert model.config.problem_type == problem_type
    # Half a batch: the Trainer gives the whole batch's count for the task loss; balancing losses use the share.
    outputs = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(2 * count))
    assert_same(outputs.loss, total / count / 2 + training * outputs.aux_loss / 2)


def test_label_smoothing_of_the_configuration_smooths_classes_while_training():
    model = tiny_classifier(label_smoothing=0.1, importance_loss_coef=0.0, load_loss_coef=0.0)
    ids, mask = padded("right")
    labels = torch.tensor([2, 0, 1])
    log_probs = logits_of_single_texts(model).log_softmax(-1)
    expected = -(0.9 * log_probs[torch.arange(3), labels] + 0.1 * log_probs.mean(-1)).mean()
    assert_same(model.train()(ids, attention_mask=mask, labels=labels).loss, expected)
    plain = -log_probs[torch.arange(3), labels].mean()
    assert_same(model.eval()(ids, attention_mask=mask, labels=labels).loss, plain)


@pytest.mark.parametrize(
    ("num_labels", "labels", "message"),
    [
        (3, torch.tensor([3, 0, 1]), "labels hold 3, allowed are 0 to num_labels - 1 = 2, and -100"),
        (3, torch.tensor([[1], [0], [1]]), r"labels have shape \(3, 1\), expected \(3,\), a class for each row"),
        (3, torch.tensor([0.0, 1.0, 0.5]), r"labels have shape \(3,\), expected \(3, 3\)"),
        (1, torch.tensor([[0.0, 1.0]] * 3), r"labels have shape \(3, 2\), expected \(3, 1\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(num_labels, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_classifier(num_labels)(padded("left")[0], attention_mask=padded("left")[1], labels=labels)


def test_other_keywords_are_refused():
    model, (ids, mask) = tiny_classifier(), padded("right")
    with pytest.raises(TypeError, match="unexpected keyword argument 'position_ids'"):
        model(ids, position_ids=torch.arange(5)[None])
    with pytest.raises(ValueError, match="use_cache=True"):
        model(ids, attention_mask=mask, use_cache=True)


def test_a_language_model_is_loaded_with_a_new_head(tmp_path, caplog):
    language_model = tiny_lm(torch.float32)
    language_model.save_pretrained(tmp_path / "lm")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "lm", num_labels=4, output_loading_info=True
    )
    assert type(model) is LstmMoeForSequenceClassification and model.score.weight.shape == (4, 8)
    assert set(info["missing_keys"]) == {"score.weight"} and not info["unexpected_keys"]
    assert torch.equal(model.model.layers[1].experts.up_proj, language_model.model.layers[1].experts.up_proj)
    std = model.score.weight.std().item()
    assert 0.1 < std < 0.8  # about 8 ** -0.5

    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    ids, mask = padded("left")
    assert torch.equal(again(ids, attention_mask=mask).logits, model.eval()(ids, attention_mask=mask).logits)


def test_commands_refuse_a_classifier_where_they_want_a_language_model(tmp_path):
    tiny_classifier().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a classifier without a softmax over the vocabulary, LstmMoeForSequence"):
        load_pretrained(AutoModelForCausalLM, str(tmp_path))


@pytest.mark.usefixtures("classes_as_before")
def test_its_code_can_be_saved_with_it(tmp_path):  # tests/test_hub.py loads such a folder without the package
    with_code(tiny_classifier().float()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == FAMILIES["lstm_moe"].auto_map
    assert {"modeling_lstm_moe.py", "task_loss.py"} <= {path.name for path in tmp_path.iterdir()}


def test_more_tokens_change_no_class():
    model, (ids, mask) = tiny_classifier(), padded("left")
    expected = model(ids, attention_mask=mask).logits
    model.resize_token_embeddings(30)
    assert model.get_input_embeddings().weight.shape == (30, 8)
    assert_same(model(ids, attention_mask=mask).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_trains_it(accumulation, tmp_path):
    """A step of gradient descent is the same, whatever the number of micro-batches (without the balancing losses)."""
    model = tiny_classifier(importance_loss_coef=0.0, load_loss_coef=0.0)
    ids = random_ids(4, 5)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, [0, 1, 2, 1])]
    expected = tiny_classifier(importance_loss_coef=0.0, load_loss_coef=0.0)
    expected(ids, labels=torch.tensor([0, 1, 2, 1])).loss.backward()
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation,
        optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, max_steps=1, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    for (name, actual), weight in zip(model.named_parameters(), expected.parameters()):
        assert_same(actual, weight - 0.1 * weight.grad, rtol=1e-6, atol=1e-9)
    assert trainer.predict(rows).predictions.shape == (4, 3)


@pytest.mark.slow
def test_the_trainers_own_label_smoothing_is_refused(tmp_path):
    rows = [{"input_ids": [3, 4], "labels": 1}] * 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, label_smoothing_factor=0.1, use_cpu=True, report_to="none", save_strategy="no"
    )
    with pytest.raises(ValueError, match="set label_smoothing in the model's configuration"):
        Trainer(tiny_classifier().float(), arguments, train_dataset=rows).train()


def test_the_librarys_pipeline_gives_its_classes(tmp_path):
    from moe_hf.data.tokenizers import train_tokenizer

    tokenizer = train_tokenizer(["the dog sees the cat", "the cat sleeps"] * 5, kind="word", vocab_size=20)
    model = tiny_classifier(id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1}, num_labels=2).float()
    classify = library_pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["the dog sees the cat", "the cat"]
    expected = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0] for text in texts]
    for found, probabilities in zip(classify(texts, batch_size=2), expected):
        assert found["label"] == ["good", "bad"][int(probabilities.argmax())]
        assert found["score"] == pytest.approx(probabilities.max().item(), abs=1e-5)


def test_strictly_balanced_and_hierarchical_gates_work_too():
    for changes in (
        {"gating": "strictly_balanced"},
        {"gating": "noisy_top_k", "num_experts": 6, "num_expert_groups": 3, "num_experts_per_tok": 4},
    ):
        model, (ids, mask) = tiny_classifier(**changes), padded("left")
        assert_same(model(ids, attention_mask=mask).logits, logits_of_single_texts(model))
        loss = model.train()(ids, attention_mask=mask, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
