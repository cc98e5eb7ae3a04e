"""Checks that `TrainingArguments` lacks: ranges, names, and combinations of arguments."""

import dataclasses

import torch
from transformers import TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.integrations import integration_utils
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..errors import InputError
from ..value_checks import (
    COUNT,
    LARGEST_FACTOR,
    MOST_BEAMS,
    MOST_PROCESSES,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Range,
    check_choice,
    check_range,
    shown,
)
from .optimizer import FACTORED_ADAM

_STEPS = Range(above=0, is_whole_above_1=True)  # below 1: a share of all steps
_LARGEST_SEED = 2**32 - 1  # the limit of numpy
RANGES = {
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "eval_delay"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), SHARE),
    "max_grad_norm": Range(least=0, is_finite=False),  # infinity: measure the norm without clipping
    "num_train_epochs": Range(above=0, most=10**9),
    "neftune_noise_alpha": POSITIVE,
    "warmup_steps": Range(least=0, is_whole_above_1=True),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), _STEPS),
    "label_smoothing_factor": SHARE,
    "seed": Range(least=0, most=_LARGEST_SEED),
    "data_seed": Range(least=0, most=2**63 - 1),
    "dataloader_num_workers": Range(least=0, most=MOST_PROCESSES),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "torch_empty_cache_steps"), COUNT),
    **dict.fromkeys(("save_total_limit", "dataloader_prefetch_factor", "ddp_timeout", "ddp_bucket_cap_mb"), COUNT),
    "generation_max_length": COUNT,
    "eval_tokens_per_batch": Range(least=1, most=LARGEST_FACTOR),
    **dict.fromkeys(("generation_num_beams", "eval_num_beams"), Range(least=1, most=MOST_BEAMS)),
    "constant_steps": NOT_NEGATIVE,
    "early_stopping_patience": COUNT,
    "early_stopping_threshold": NOT_NEGATIVE,
}
# Schedules for which the library ignores warmup_steps.
_WITHOUT_WARMUP = {
    "constant": "use constant_with_warmup",
    "reduce_lr_on_plateau": "leave it out",
    "greedy": 'leave it out, or give lr_scheduler_kwargs={"warmup": ...}',
}
_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def check_training_arguments(args: TrainingArguments) -> None:
    """Check the arguments before the library uses them.

    Raises:
        InputError: a number is out of range, a name is not known, or arguments do not go together.
    """
    for field in dataclasses.fields(args):
        value = getattr(args, field.name, None)
        if field.name in RANGES:
            check_range(field.name, value, RANGES[field.name])
        if value is not None and (choices := field.metadata.get("choices")):
            check_choice(field.name, value, list(choices))
    if args.max_steps != -1 and args.max_steps < 1:
        raise InputError(f"max_steps={args.max_steps} must be at least 1, or -1 to train for num_train_epochs")
    check_choice("optim", plain(args.optim), [FACTORED_ADAM, *(name.value for name in OptimizerNames)])
    check_choice("lr_scheduler_type", plain(args.lr_scheduler_type), [name.value for name in SchedulerType])
    if args.torch_compile_mode is not None:
        check_choice("torch_compile_mode", args.torch_compile_mode, _COMPILE_MODES)
    for option in args.debug.split() if isinstance(args.debug, str) else args.debug or []:
        check_choice("debug", plain(option), [known.value for known in DebugOption])
        if plain(option) == DebugOption.UNDERFLOW_OVERFLOW.value:
            raise InputError(
                f"debug={plain(option)} does not work with these models: it fails on the masks of their gates"
            )
    tokens_seen = args.include_num_input_tokens_seen
    check_choice("include_num_input_tokens_seen", tokens_seen, [True, False, "all", "non_padding", "no"])
    if args.use_liger_kernel:
        raise InputError("use_liger_kernel=True has no effect: Liger has no kernels for these models")
    _check_reports(args.report_to)
    _check_together(args)


def plain(value):
    """Return the value of an enumeration's member, and any other value unchanged."""
    return getattr(value, "value", value)


def _check_reports(report_to) -> None:
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    known = list(integration_utils.INTEGRATION_TO_CALLBACK)
    for name in names:
        if name in ("all", "none") and len(names) == 1:
            continue
        check_choice("report_to", name, ["none", "all", *known])
        # azure_ml has is_azureml_available, and comet_ml is_comet_available.
        spellings = (name, name.replace("_", ""), name.removesuffix("_ml"))
        tests = [getattr(integration_utils, f"is_{spelling}_available", None) for spelling in spellings]
        if not all(is_available() for is_available in tests if is_available):
            raise InputError(f"report_to={shown(name)} cannot be used: its package is not installed")


def _check_together(args: TrainingArguments) -> None:
    optim = plain(args.optim)
    if optim == FACTORED_ADAM and not args.adam_epsilon >= 1e-38:
        raise InputError(f"adam_epsilon={args.adam_epsilon} must be at least 1e-38 with optim={FACTORED_ADAM}")
    if optim == FACTORED_ADAM and args.optim_args:
        raise InputError(f"optim_args={shown(args.optim_args)} has no effect with optim={FACTORED_ADAM}, leave it out")
    if args.fp16 and (args.use_cpu or not torch.accelerator.is_available()):
        raise InputError("fp16=True needs an accelerator: on a CPU use bf16=True, or neither")
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise InputError("dataloader_persistent_workers=True needs dataloader_num_workers of at least 1, got 0")
    schedule = plain(args.lr_scheduler_type)
    if args.warmup_steps and schedule in _WITHOUT_WARMUP:
        advice = _WITHOUT_WARMUP[schedule]
        raise InputError(f"warmup_steps={args.warmup_steps} has no effect with lr_scheduler_type={schedule}: {advice}")
    if args.early_stopping_threshold and args.early_stopping_patience is None:
        threshold = args.early_stopping_threshold
        raise InputError(f"early_stopping_threshold={threshold} has no effect without early_stopping_patience")
    if plain(args.eval_strategy) == "no":
        if args.load_best_model_at_end:
            raise InputError("load_best_model_at_end=True needs an eval_strategy, not eval_strategy=no")
        if args.early_stopping_patience is not None:
            patience = args.early_stopping_patience
            raise InputError(f"early_stopping_patience={patience} needs an eval_strategy, not eval_strategy=no")
        if plain(args.save_strategy) == "best":
            raise InputError("save_strategy=best needs an eval_strategy, not eval_strategy=no")
