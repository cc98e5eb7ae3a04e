"""lm-evaluation-harness on the language model gives the same numbers as the model itself."""

from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

TASKS = Path(__file__).parents[2] / "examples" / "lm_eval"


def log_likelihood(model, tokenizer, prompt, ending):
    """Of `ending` after `prompt`, token by token; an empty prompt is the end-of-sentence symbol."""
    start = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    ids = torch.tensor([start + tokenizer(ending)["input_ids"]])
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
    scored = log_probs[len(start) - 1 :].gather(1, ids[0, len(start) :, None])
    is_greedy = torch.equal(log_probs[len(start) - 1 :].argmax(-1), ids[0, len(start) :])
    return scored.sum().item(), is_greedy


@pytest.mark.parametrize("kind, trust_remote_code", [("exported", True), ("saved", False)])
def test_a_local_task_gives_the_models_own_likelihoods(kind, trust_remote_code, folders):
    arguments = {"pretrained": str(folders[kind]), "trust_remote_code": trust_remote_code}
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=["demo_sentences"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        batch_size=3,  # sentences of different lengths: padded on the right
        device="cpu",
        limit=8,
        log_samples=True,
        bootstrap_iters=0,
    )
    model = AutoModelForCausalLM.from_pretrained(folders["saved"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["saved"])
    samples = results["samples"]["demo_sentences"]
    assert len(samples) == 8 and samples[0]["doc"]["prompt"] == ""
    expected = [log_likelihood(model, tokenizer, s["doc"]["prompt"], s["doc"]["ending"]) for s in samples]
    actual = [s["filtered_resps"][0] for s in samples]
    for (value, is_greedy), (expected_value, expected_greedy) in zip(actual, expected):
        assert float(value) == pytest.approx(expected_value, abs=1e-4)
        assert is_greedy == expected_greedy
    mean = sum(value for value, _ in expected) / len(expected)
    perplexity = results["results"]["demo_sentences"]["perplexity,none"]
    assert perplexity == pytest.approx(torch.tensor(-mean).exp().item(), rel=1e-4)
