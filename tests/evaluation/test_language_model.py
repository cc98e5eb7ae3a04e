"""Evaluation of a saved model on text files, and the loads of its experts."""

import pytest
import torch
from tiny_training import noiseless_lm
from torch.nn.functional import cross_entropy

from moe_hf.data.tokenizers import train_tokenizer
from moe_hf.errors import InputError
from moe_hf.evaluation.language_model import evaluate_lm
from moe_hf.routing.observe import expert_load, load_statistics, routing_totals

TEXT = [f"the {color} {animal} saw a bird" for color in ("red", "blue", "green") for animal in ("cat", "dog")] * 5


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = train_tokenizer(TEXT, kind="word", vocab_size=20)
    model = noiseless_lm(torch.float32, vocab_size=len(tokenizer)).eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(TEXT) + "\n", encoding="utf-8")
    return model, tokenizer, folder


def test_evaluation_of_a_saved_model_is_one_pass_over_the_text(saved):
    model, tokenizer, folder = saved
    metrics = evaluate_lm(str(folder / "model"), [str(folder / "text.txt")], window_length=7, batch_size=1)
    ids = torch.tensor([[i for line in TEXT for i in [*tokenizer(line)["input_ids"], tokenizer.eos_token_id]]])
    with torch.no_grad(), routing_totals(model) as totals:
        logits = model(ids[:, :-1], labels=ids[:, :-1]).logits
    loss = cross_entropy(logits[0], ids[0, 1:]).item()
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    ((layer, total),) = totals.items()
    for name, value in load_statistics(total.tokens).items():
        assert metrics[f"{layer}/{name}"] == pytest.approx(value, rel=1e-6)


def test_window_length_does_not_change_the_result(saved):
    _, _, folder = saved
    first, second = (
        evaluate_lm(str(folder / "model"), [str(folder / "text.txt")], window_length=length, batch_size=3)["eval_loss"]
        for length in (4, 11)
    )
    assert first == pytest.approx(second, rel=1e-5)


def test_expert_load_counts_every_token_k_times_whatever_the_batches(saved):
    model, tokenizer, _ = saved
    lines = [*TEXT[:3], "the bird"]
    num_tokens = sum(len(tokenizer(line)["input_ids"]) for line in lines)
    (together,) = expert_load(model, tokenizer, lines).values()
    (apart,) = expert_load(model, tokenizer, lines, batch_size=1).values()
    assert together.sum() == model.config.num_experts_per_tok * num_tokens
    assert together.tolist() == apart.tolist()


def test_load_statistics_by_hand():
    statistics = load_statistics(torch.tensor([0.0, 4.0, 4.0, 8.0]))
    assert statistics == {"cv_load": pytest.approx(0.5**0.5), "max_over_mean_load": 2.0, "dead_experts": 1}


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(InputError, match="model=.*nowhere: cannot be loaded"):
        evaluate_lm(str(tmp_path / "nowhere"), ["x.txt"])
