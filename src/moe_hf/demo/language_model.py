"""Runs the language-model demo: trains a small LSTM-MoE on generated sentences, and checks its output."""

import logging
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..routing.observe import expert_load, load_statistics
from ..training.arguments import parse_arguments
from ..training.lm import train_lm
from ..writing import naming
from .text_corpus import DIALECTS, PROMPTS, dialect_of, is_correct, prompt_of, write_demo_corpus

logger = logging.getLogger(__name__)


def run_demo(config_file: str, output_dir: str) -> dict[str, float]:
    """Write the corpus, train a model, report on it, and load the saved model to compare it.

    Args:
        config_file: YAML file with the arguments of the training.
        output_dir: folder for the corpus and the model; must be empty or absent.

    Returns:
        {"perplexity_before": p, "perplexity_after": q, "share_true": s}. The perplexities are per word of held-out
        sentences; s is the share of held-out sentences that the model completes to a true sentence.
    """
    data_dir, model_dir = Path(output_dir) / "data", Path(output_dir) / "model"
    with naming("output_dir", output_dir):
        train_file, valid_file = write_demo_corpus(data_dir)
    _title("The corpus: six dialects, true sentences only; the validation sentences are not in the training text")
    for line in _one_line_of_each_dialect(valid_file).values():
        logger.info(f"  {line}")

    _title("Training")
    files = ["--train_files", str(train_file), "--validation_files", str(valid_file), "--output_dir", str(model_dir)]
    trainer, metrics = train_lm(*parse_arguments([config_file, *files]))
    before = next(log for log in trainer.state.log_history if "eval_loss" in log)["eval_perplexity_per_word"]
    after = metrics["eval_perplexity_per_word"]
    logger.info(f"perplexity per word on held-out sentences: {before:.1f} before training, {after:.2f} after")

    model, tokenizer = trainer.model.eval(), trainer.processing_class
    valid_lines = Path(valid_file).read_text(encoding="utf-8").splitlines()
    _title("Load of the experts, by dialect: share of its tokens that go to each expert, in %")
    _log_load_table(model, tokenizer, valid_lines)

    _title("Continuations (greedy)")
    for prompt, text in zip(PROMPTS, complete(model, tokenizer, PROMPTS)):
        verdict = {True: "true", False: "false", None: "no sentence"}[is_correct(text)]
        logger.info(f"  {prompt} ->{text.removeprefix(prompt)}  [{verdict}]")
    share_true = _report_truth(model, tokenizer, valid_lines[:300])

    _title("Saved, and loaded back with AutoModelForCausalLM")
    loaded = AutoModelForCausalLM.from_pretrained(model_dir)
    inputs = AutoTokenizer.from_pretrained(model_dir)(valid_lines[:8], return_tensors="pt", padding=True)
    with torch.no_grad():
        loaded.set_experts_implementation(model.config._experts_implementation)
        difference = (loaded(**inputs).logits - model(**inputs).logits).abs().max().item()
    logger.info(f"{type(loaded).__name__} from {model_dir}: largest difference of a logit {difference:.1e}")
    if difference > 0:
        raise RuntimeError(f"the model loaded from {model_dir} is not the one saved")
    return {"perplexity_before": before, "perplexity_after": after, "share_true": share_true}


def complete(model, tokenizer, prompts: list[str], max_new_tokens: int = 30) -> list[str]:
    """Continue each prompt greedily to the end of its sentence.

    Args:
        model (PreTrainedModel): a language model.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        prompts: beginnings of sentences.
        max_new_tokens: maximal number of tokens added to a prompt.
    """
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    outputs = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(outputs, skip_special_tokens=True)


def _report_truth(model, tokenizer, lines: list[str]) -> float:
    """Log how many held-out sentences of each dialect the model completes truly, and return the overall share."""
    finished = complete(model, tokenizer, [prompt_of(line) for line in lines])
    true, total = Counter(), Counter()
    for line, text in zip(lines, finished):
        total[dialect_of(line)] += 1
        true[dialect_of(line)] += is_correct(text) is True
    share = sum(true.values()) / len(lines)
    by_dialect = ", ".join(f"{name} {true[name]}/{total[name]}" for name in DIALECTS if total[name])
    logger.info(f"held-out sentences finished truly: {share:.0%} ({by_dialect})")
    return share


def _log_load_table(model, tokenizer, lines: list[str]) -> None:
    groups = {name: [line for line in lines if dialect_of(line) == name] for name in DIALECTS}
    loads = {name: expert_load(model, tokenizer, group) for name, group in groups.items()}
    for layer in next(iter(loads.values())):
        shares = {name: load[layer] / load[layer].sum() for name, load in loads.items()}
        total = sum(load[layer] for load in loads.values())
        shares["all"] = total / total.sum()
        logger.info(f"{layer:12}" + "".join(f"{expert:4d}" for expert in range(len(total))))
        for name, share in shares.items():
            logger.info(f"  {name:10}" + "".join(f"{100 * value:4.0f}" for value in share.tolist()))
        statistics = load_statistics(total)
        logger.info(f"  max/mean load {statistics['max_over_mean_load']:.2f}, CV(load) {statistics['cv_load']:.2f}")


def _one_line_of_each_dialect(file) -> dict[str, str]:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return {dialect_of(line): line for line in reversed(lines)}


def _title(text: str) -> None:
    logger.info(f"\n== {text}")
