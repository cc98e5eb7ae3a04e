"""The part that training runs of both families share: creating the model, training, and saving the results."""

import json
import logging
import sys
import warnings
from functools import partial
from pathlib import Path

import yaml
from datasets import disable_progress_bars
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging as transformers_logging

from ..data.tokenizers import load_tokenizer
from ..distributed.sharding import distributed_config, shard_new_model
from ..errors import InputError, first_line
from ..families import Family
from ..hub_errors import check_upload
from ..loading import check_vocabulary, load_config, load_pretrained
from ..run_folder import CONFIG_FILE, HISTORY_FILE
from ..writing import whole_files
from .arguments import ModelArguments, MoeTrainingArguments, changed_arguments
from .callbacks import AuxLossCallback
from .checkpoints import check_same_run
from .early_stopping import ResumableEarlyStopping
from .interrupt import InterruptCallback
from .moe_trainer import GO_ON
from .optimizer import OptimizerSizeCallback

logger = logging.getLogger(__name__)

# Arguments that may change when a run is resumed.
MAY_CHANGE_ON_RESUME = (
    "recompute_experts",
    "validation_files",
    "validation_source_files",
    "validation_target_files",
    "validation_pairs",
    "validation_split",
    "preprocessing_num_workers",
    "cache_dir",
)
MUST_MATCH_ON_RESUME = (
    "seed data_seed optim optim_args learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps constant_steps importance_loss_coef_schedule "
    "load_loss_coef_schedule bf16 fp16 balance_across_processes expert_gradients"
).split()


def run_identity(model_args, data_args, training_args) -> dict:
    """Return the arguments that determine a run's final weights, except the number of steps.

    Args:
        model_args (object): the model arguments.
        data_args (object): the data arguments.
        training_args (MoeTrainingArguments): the training arguments.

    Returns:
        {name: value}; a resumed run must have the same.
    """
    given = {**vars(model_args), **vars(data_args)}
    identity = {name: value for name, value in given.items() if name not in MAY_CHANGE_ON_RESUME}
    identity |= {name: getattr(training_args, name) for name in MUST_MATCH_ON_RESUME if hasattr(training_args, name)}
    # A run may be resumed with another number of processes if its steps stay the same.
    steps = training_args.gradient_accumulation_steps * training_args.world_size
    return identity | {"rows_per_step (of all processes)": training_args.per_device_train_batch_size * steps}


def check_hub_arguments(training_args: MoeTrainingArguments) -> None:
    """Check at the start that a run with `push_to_hub` may upload.

    Raises:
        InputError: the run may not upload, see `check_upload`.
    """
    if training_args.push_to_hub and training_args.should_save:
        repo_id = training_args.hub_model_id or Path(training_args.output_dir).absolute().name
        check_upload(repo_id, "hub_model_id", training_args.hub_token)


def quiet_logs(training_args: MoeTrainingArguments) -> None:
    """Set the log levels: the library's by its arguments, this package's by rank. Hide progress bars in a log file."""
    if training_args.process_index:
        logging.getLogger("moe_hf").setLevel(logging.WARNING)
    transformers_logging.get_logger("transformers").setLevel(training_args.get_process_log_level())
    if not sys.stderr.isatty():
        disable_progress_bars()
        transformers_logging.disable_progress_bar()
    # The LSTM's state is a view of a larger tensor, which is never changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def run_training(trainer: Trainer, checkpoint: str | None, model_args, data_args) -> dict:
    """Train; save model, tokenizer, state, arguments and the experts' history into `output_dir`; evaluate.

    Args:
        trainer: a trainer with the training dataset, and optionally an evaluation dataset.
        checkpoint: the checkpoint to resume from, or None.
        model_args (object): the model arguments of the trainer.
        data_args (object): the data arguments of the trainer.

    Returns:
        the metrics of the last evaluation, empty without an evaluation dataset.

    Raises:
        InterruptedRun: Ctrl-C or a scheduler ended the run early; `output_dir` has a checkpoint of its last step.
    """
    args = trainer.args
    AuxLossCallback(
        history_file=Path(args.output_dir) / HISTORY_FILE,
        importance_loss_coef_schedule=args.importance_loss_coef_schedule,
        load_loss_coef_schedule=args.load_loss_coef_schedule,
    ).attach_to(trainer)
    trainer.add_callback(OptimizerSizeCallback())
    if checkpoint or args.should_save:  # every process checks, so that no process waits for a stopped one
        check_same_run(args.output_dir, checkpoint, run_identity(model_args, data_args, args))
    if args.should_save:
        config = yaml.safe_dump(changed_arguments(model_args, data_args, args), sort_keys=False, allow_unicode=True)
        with whole_files(args.output_dir, "output_dir") as folder:
            (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
    if args.early_stopping_patience is not None:
        trainer.add_callback(ResumableEarlyStopping(args.early_stopping_patience, args.early_stopping_threshold))
    interrupt = InterruptCallback()
    trainer.add_callback(interrupt)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        interrupt.restore()
    if args.load_best_model_at_end and trainer.state.best_model_checkpoint is None:
        logger.warning(
            "load_best_model_at_end: there is no best checkpoint (no evaluation had a finite metric, or the "
            "checkpoint was deleted), so the model of the last step is saved"
        )
    trainer.save_model()
    save_results(trainer, "train", result.metrics)
    if trainer.eval_dataset is None:
        return {}
    metrics = trainer.evaluate()
    save_results(trainer, "eval", metrics)
    return metrics


def tokenizer_source(model_args, data_args, checkpoint: str | None) -> tuple[str | None, str]:
    """Return the source of a run's tokenizer (None to train one), and the argument that names the source.

    The tokenizer of a resumed run is in the checkpoint, and the tokenizer of a fine-tuned model is in the model's
    folder.

    Args:
        model_args (object): may name a model.
        data_args (object): may name a tokenizer.
        checkpoint: the checkpoint to resume from, or None.
    """
    named = {
        "resume_from_checkpoint": checkpoint,
        "tokenizer_name_or_path": data_args.tokenizer_name_or_path,
        "model_name_or_path": model_args.model_name_or_path,
    }
    return next(((path, name) for name, path in named.items() if path), (None, "tokenizer_name_or_path"))


def check_named_folders(family: Family, model_args, data_args, checkpoint: str | None) -> None:
    """Check that the given model and tokenizer can be loaded, before any text is read.

    Args:
        family: the family to train.
        model_args (object): may name a model.
        data_args (object): may name a tokenizer.
        checkpoint: the checkpoint to resume from, or None.

    Raises:
        InputError: the model or the tokenizer is damaged or does not exist, or the model is of another kind.
    """
    if path := checkpoint or model_args.model_name_or_path:
        argument = "resume_from_checkpoint" if checkpoint else "model_name_or_path"
        changes = {} if checkpoint else model_args.config_arguments()
        found = load_config(path, family.auto_class, argument=argument, **changes).model_type
        if found != family.config_class.model_type and not checkpoint:
            expected = family.config_class.model_type
            raise InputError(f"{argument}={path} has model_type={found!r}, expected {expected!r}")
    path, argument = tokenizer_source(model_args, data_args, checkpoint)
    if path:
        load_tokenizer(path, argument)


def save_results(trainer: Trainer, part: str, metrics: dict) -> None:
    """Write the metrics, and after the training its state, into `output_dir`: all of these files or none.

    Args:
        trainer: the trainer; its first process writes.
        part: "train" or "eval".
        metrics: {name: value}.

    Raises:
        InputError: the files cannot be written.
    """
    if not trainer.is_world_process_zero():
        return
    known = Path(trainer.args.output_dir) / "all_results.json"
    together = (json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}) | metrics
    with whole_files(trainer.args.output_dir, "output_dir", GO_ON) as folder:
        for name, values in ((f"{part}_results.json", metrics), (known.name, together)):
            (folder / name).write_text(json.dumps(values, indent=4, sort_keys=True), encoding="utf-8")
        if part == "train":
            trainer.state.save_to_json(str(folder / "trainer_state.json"))


def build_model(
    model_class: type[PreTrainedModel],
    auto_class,
    model_args: ModelArguments,
    data_args,
    training_args: MoeTrainingArguments,
    tokenizer,
    checkpoint: str | None = None,
    **config,
) -> PreTrainedModel:
    """Return a new model for the tokenizer's vocabulary and special tokens, or the model to fine-tune.

    Args:
        model_class: the model class of a new model.
        auto_class (type): the Auto class that loads a model to fine-tune.
        model_args: the given model arguments.
        data_args (object): the given data arguments, for the name of the tokenizer's source in errors.
        training_args: the given training arguments.
        tokenizer (PreTrainedTokenizerBase): names vocabulary and special tokens.
        checkpoint: the checkpoint to resume from; a sharded model is loaded from it directly.
        **config (Any): further arguments of a new model's configuration.

    Raises:
        InputError: an argument is not allowed, or the checkpoint cannot be loaded or does not fit.
    """
    sharding = distributed_config(training_args)
    path = checkpoint if checkpoint and sharding else model_args.model_name_or_path
    if path is None:
        build = partial(new_model, model_class, model_args, tokenizer, **config)
        return build() if sharding is None else shard_new_model(build, sharding)
    model = load_pretrained(
        auto_class,
        path,
        model_args.config_arguments(),
        argument="resume_from_checkpoint" if path == checkpoint else "model_name_or_path",
        experts_implementation=model_args.experts_implementation,
        distributed_config=sharding,
    )
    source, argument = tokenizer_source(model_args, data_args, checkpoint)
    check_vocabulary(tokenizer, model.config, f"{argument}={source}")
    return model


def new_model(model_class, model_args: ModelArguments, tokenizer, **config) -> PreTrainedModel:
    """Make a model with the configuration of `new_config`.

    Args:
        model_class (type[PreTrainedModel]): the family's model class.
        model_args: the given arguments.
        tokenizer (PreTrainedTokenizerBase): names vocabulary and special tokens.
        **config (Any): further arguments of the configuration.

    Raises:
        InputError: an argument is not allowed.
    """
    config = new_config(model_class.config_class, model_args, tokenizer, **config)
    config._experts_implementation = model_args.experts_implementation
    try:
        return model_class(config)
    except ValueError as error:
        raise InputError(first_line(error)) from error


def new_config(config_class, model_args: ModelArguments, tokenizer, **config):
    """Make the configuration of a new model, with the tokenizer's vocabulary and special tokens.

    Args:
        config_class (type[MoeConfig]): the family's configuration class.
        model_args: the given arguments.
        tokenizer (PreTrainedTokenizerBase): names vocabulary and special tokens.
        **config (Any): further arguments of the configuration.

    Raises:
        InputError: an argument is not allowed.
    """
    try:
        return config_class(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **config,
            **model_args.config_arguments(),
        )
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise InputError(first_line(error)) from error
