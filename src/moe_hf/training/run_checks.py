"""Checks of a run before it reads any data: an impossible model, unknown names."""

import copy
import inspect
import logging
import warnings

import torch
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.training_args import ParallelMode

from ..errors import InputError, first_line
from ..loading import load_config
from ..model_size import check_memory
from ..models.configuration_moe import MoeConfig
from ..value_checks import shown
from .argument_checks import plain
from .callbacks import AuxLossCallback
from .optimizer import FACTORED_ADAM

logger = logging.getLogger(__name__)

# {metric of an evaluation: whether more is better}.
LM_METRICS = dict.fromkeys(("loss", "perplexity_per_token", "perplexity_per_word", "bits_per_word"), False)
TRANSLATION_METRICS = LM_METRICS | dict.fromkeys(("bleu", "bleu_lowercase", "chrf"), True)
# Arguments that a checkpoint's weights fix, because they decide the shapes.
FIXED_BY_WEIGHTS = (
    *("hidden_size", "lstm_hidden_size", "num_experts", "moe_intermediate_size", "num_expert_layers"),
    *("num_expert_groups", "layer_pattern", "encoder_layer_pattern", "decoder_layer_pattern"),
    *("encoder_bidirectional_first", "attention_type", "attention_feeding", "deep_output"),
    "share_embeddings",
)
# Arguments of the initial weights.
ONLY_FOR_NEW_WEIGHTS = ("initializer_range", "gate_std")


def check_run(model_class: type[PreTrainedModel] | None, model_args, data_args, training_args, metrics) -> None:
    """Check everything that does not need data.

    Args:
        model_class: the family's model class; None for a model of another package, which is not checked.
        model_args (ModelArguments): the model arguments.
        data_args (object): the data arguments.
        training_args (MoeTrainingArguments): the training arguments.
        metrics (dict[str, bool]): {metric of an evaluation, without "eval_": whether more is better}.

    Raises:
        InputError: an argument is wrong.
    """
    _warn_of_idle_device(training_args)
    _check_metric(training_args, metrics)
    _check_optimizer(training_args)
    _check_scheduler(training_args)
    _check_checkpointing(training_args)
    _check_evaluation_dtype(training_args)
    AuxLossCallback(  # checks the schedules
        importance_loss_coef_schedule=training_args.importance_loss_coef_schedule,
        load_loss_coef_schedule=training_args.load_loss_coef_schedule,
    )
    if training_args.fsdp and training_args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise InputError("fsdp=True needs several processes: start the command with torchrun or accelerate launch")
    if training_args.label_smoothing_factor:
        raise InputError(
            f"label_smoothing_factor={training_args.label_smoothing_factor} would replace the model's loss, and with "
            "it the balancing losses; only 0 is allowed, use the model's label_smoothing instead"
        )
    if model_class is not None:
        if model_args.model_name_or_path is None:
            _check_new_model(model_class, model_args, data_args, training_args)
        else:
            _check_changes(model_args)


def _warn_of_idle_device(args) -> None:
    if args.use_cpu and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        logger.warning(
            f"use_cpu=True: the training runs on the CPU and leaves the {device} device idle; leave use_cpu out"
        )


def _check_metric(args, metrics) -> None:
    name = args.metric_for_best_model
    if name is None:
        return
    bare = name.removeprefix("eval_")
    of_all = bare.rpartition("_")[0] if "-" in bare else bare  # bleu for bleu_en-de
    if of_all not in metrics:
        raise InputError(f"metric_for_best_model={name!r} is not known, use one of {', '.join(metrics)}")
    if args.greater_is_better is not metrics[of_all]:
        raise InputError(
            f"greater_is_better={args.greater_is_better} would keep the worst model by metric_for_best_model={name}"
        )


def _check_optimizer(args) -> None:
    if args.optim == FACTORED_ADAM:
        return
    try:
        optimizer_class, arguments = Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(1, 1))
    except ImportError as error:
        raise InputError(f"optim={plain(args.optim)!r} cannot be used here: {first_line(error)}") from error
    except Exception as error:  # optimizers raise many kinds of errors for their arguments
        name = f"optim_args={shown(args.optim_args)}" if args.optim_args else f"optim={plain(args.optim)!r}"
        raise InputError(f"{name} cannot be used: {first_line(error)}") from error
    without = copy.copy(args)
    without.optim_args = None
    is_of_torch = optimizer_class.__module__.startswith("torch.")  # other optimizers may store them elsewhere
    if args.optim_args and is_of_torch and arguments == Trainer.get_optimizer_cls_and_kwargs(without)[1]:
        raise InputError(f"optim_args={shown(args.optim_args)} has no effect with optim={plain(args.optim)}")


def _check_scheduler(args) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate or 1.0)
    kind, arguments = plain(args.lr_scheduler_type), args.lr_scheduler_kwargs
    try:
        schedule = get_scheduler(
            kind,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(100),
            num_training_steps=100,
            scheduler_specific_kwargs=arguments,
        )
        for _ in range(3):
            optimizer.step()
            schedule.step(*([1.0] if kind in ("reduce_lr_on_plateau", "greedy") else []))
    except Exception as error:  # schedulers raise many kinds of errors for their arguments
        raise InputError(
            f"lr_scheduler_type={kind} cannot be used with lr_scheduler_kwargs={shown(arguments)}: {first_line(error)}"
        ) from error


def _check_evaluation_dtype(args) -> None:
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise InputError(
                f"{name}=True has no effect here: with bf16=True, evaluations compute in bfloat16 as well"
            )


def _check_checkpointing(args) -> None:
    known = [*inspect.signature(torch.utils.checkpoint.checkpoint).parameters, "preserve_rng_state"]
    for name in args.activation_checkpointing_kwargs or {}:
        if name not in known:
            raise InputError(f"activation_checkpointing_kwargs: {name!r} is not known, see torch.utils.checkpoint")
    backend = args.torch_compile_backend
    if args.torch_compile and backend not in (known_backends := torch.compiler.list_backends(None)):
        raise InputError(f"torch_compile_backend={backend!r} is not known, use one of {', '.join(known_backends)}")


def _check_new_model(model_class, model_args, data_args, training_args) -> None:
    given = model_args.config_arguments()
    if "num_groups_per_tok" in given and "num_expert_groups" not in given:
        raise InputError(f"num_groups_per_tok={given['num_groups_per_tok']} needs num_expert_groups as well")
    # The vocabulary of a tokenizer that is loaded later is not known yet.
    vocab_size = (given.get("num_sampled") or 0) + 1 if data_args.tokenizer_name_or_path else data_args.vocab_size
    try:
        config: MoeConfig = model_class.config_class(vocab_size=vocab_size, **given)
    except Exception as error:
        raise InputError(first_line(error)) from error
    is_sharded = training_args.expert_parallel_size != 1 or training_args.fsdp
    check_memory(config, training_args.world_size if is_sharded else 1)
    config._experts_implementation = model_args.experts_implementation
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the training builds the model again, and warns then
            model_class(config)
    except (ValueError, ImportError) as error:
        raise InputError(first_line(error)) from error


def _check_changes(model_args) -> None:
    """Check the model arguments given with a checkpoint: they must be allowed, and must not contradict its weights."""
    given, path = model_args.config_arguments(), model_args.model_name_or_path
    own = load_config(path)
    for name in ONLY_FOR_NEW_WEIGHTS:
        if name in given:
            raise InputError(
                f"{name}={given[name]} has no effect with model_name_or_path={path}, whose weights are trained: leave "
                "it out"
            )
    for name in FIXED_BY_WEIGHTS:
        if name in given and hasattr(own, name) and given[name] != getattr(own, name):
            raise InputError(
                f"{name}={given[name]} differs from {name}={getattr(own, name)} of model_name_or_path={path}, whose "
                f"weights fix {name}: leave it out"
            )
