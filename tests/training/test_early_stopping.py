"""Early stopping, and schedules that follow a metric."""

import pytest
from tiny_runs import write_config

from moe_hf.training.arguments import TranslationTrainingArguments, parse_arguments
from moe_hf.training.lm import train_lm

NEVER_BETTER = ("--learning_rate", "0", "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "9")


@pytest.fixture
def arguments_of(tmp_path):
    """Parses the configuration of a tiny run, changed by the given words."""
    write_config(tmp_path)
    return lambda *words: parse_arguments([str(tmp_path / "config.yaml"), *map(str, words)])


@pytest.mark.parametrize(("patience", "steps"), [(1, 2), (3, 4)])
def test_a_run_ends_after_so_many_evaluations_without_a_better_loss(patience, steps, arguments_of, caplog):
    caplog.set_level("INFO", logger="moe_hf")
    trainer, metrics = train_lm(*arguments_of(*NEVER_BETTER, "--early_stopping_patience", patience))
    assert trainer.state.global_step == steps and "eval_loss" in metrics
    best = f"{metrics['eval_loss']:.4g}"
    reason = f"no better loss than {best} in {patience} evaluations in a row"
    assert caplog.text.count("stops after step") == 1 and f"stops after step {steps} of 9: {reason}" in caplog.text


def test_a_run_that_improves_goes_to_its_end(arguments_of, caplog):
    words = ("--learning_rate", "1e-3", *NEVER_BETTER[2:], "--early_stopping_patience", "1")
    trainer, _ = train_lm(*arguments_of(*words))
    assert trainer.state.global_step == 9 and "stops after" not in caplog.text


def test_improvements_up_to_the_threshold_do_not_count(arguments_of):
    words = ("--learning_rate", "1e-6", *NEVER_BETTER[2:], "--early_stopping_patience", "1")
    assert train_lm(*arguments_of(*words, "--early_stopping_threshold", "1"))[0].state.global_step == 2


def test_a_resumed_run_counts_on(arguments_of):
    words = (*NEVER_BETTER, "--early_stopping_patience", "4", "--save_strategy", "steps", "--save_steps", "1")
    first, _ = train_lm(*arguments_of(*words, "--save_total_limit", "9"))
    folder = first.args.output_dir
    again, _ = train_lm(*arguments_of(*words, "--resume_from_checkpoint", f"{folder}/checkpoint-3"))
    assert first.state.global_step == again.state.global_step == 5


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize(("metric", "mode"), [("loss", "min"), ("perplexity_per_word", "min"), ("bleu", "max")])
def test_a_schedule_knows_which_direction_is_better(schedule, metric, mode, arguments_of, tmp_path):
    if metric == "bleu":
        arguments = TranslationTrainingArguments(
            str(tmp_path), eval_strategy="steps", lr_scheduler_type=schedule, metric_for_best_model=metric
        )
    else:
        words = ("--lr_scheduler_type", schedule, "--metric_for_best_model", metric)
        *_, arguments = arguments_of(*words, "--eval_strategy", "steps", "--warmup_steps", "0")
    assert (arguments.lr_scheduler_kwargs or {}).get("mode", "min") == mode


def test_the_rate_is_halved_on_a_plateau(arguments_of):
    plateau = ("--lr_scheduler_type", "reduce_lr_on_plateau", "--warmup_steps", "0")
    words = (*plateau, "--lr_scheduler_kwargs", '{"factor": 0.5, "patience": 1, "threshold": 10}')
    steps = ("--learning_rate", "1e-6", "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "5")
    trainer, _ = train_lm(*arguments_of(*words, *steps))
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.25e-6)
