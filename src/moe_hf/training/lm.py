"""Trains an LSTM-MoE language model: from text files to a folder with model, tokenizer and history."""

import copy
import logging
import math
from collections.abc import Callable

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..data.arguments import DataArguments
from ..data.cache_folder import cached_in
from ..data.text import TokenStream, load_text_dataset, tokenize_to_stream
from ..data.tokenizers import load_or_train_tokenizer
from ..data.windows import StreamWindows, collate_windows
from ..distributed.waiting import broadcast_from_rank_zero, local_rank_zero_first
from ..errors import InputError
from ..evaluation.metrics import load_metric
from ..families import LANGUAGE_MODELS
from ..models.modeling_lstm_moe import LstmMoeForCausalLM
from .arguments import LmModelArguments, MoeTrainingArguments
from .lm_trainer import LmTrainer
from .run_checks import LM_METRICS
from .run_start import started_run
from .runs import build_model, run_training, tokenizer_source

logger = logging.getLogger(__name__)


def train_lm(
    model_args: LmModelArguments,
    data_args: DataArguments,
    training_args: MoeTrainingArguments,
    new_model: Callable[[PreTrainedTokenizerBase], PreTrainedModel] | None = None,
) -> tuple[LmTrainer, dict[str, float]]:
    """Train and evaluate a model, and save the model, its tokenizer and the history into `output_dir`.

    Args:
        model_args: the model arguments.
        data_args: the data arguments.
        training_args: the training arguments.
        new_model: function that makes a model for the tokenizer, for models of other packages
            (`experiments/baselines.py`).

    Returns:
        the trainer, and the metrics of the last evaluation (empty without validation text).

    Raises:
        InputError: the arguments or the data are wrong, or another run writes into `output_dir`.
        NonFiniteLossError: the training diverged.
    """
    is_own = new_model is None
    with started_run(LANGUAGE_MODELS, model_args, data_args, training_args, LM_METRICS, is_own) as checkpoint:
        return _train(model_args, data_args, training_args, new_model, checkpoint)


def _train(model_args, data_args, training_args, new_model, checkpoint) -> tuple[LmTrainer, dict[str, float]]:
    if data_args.carry_state:
        _check_carry(training_args)
    with cached_in(data_args.cache_dir):
        tokenizer, streams = load_streams(model_args, data_args, training_args, checkpoint)
    if new_model is None:
        model = build_model(
            LstmMoeForCausalLM,
            AutoModelForCausalLM,
            model_args,
            data_args,
            training_args,
            tokenizer,
            checkpoint=checkpoint,
        )
    else:
        model = new_model(tokenizer)
    windows = cut_windows(streams, data_args, training_args)
    log_model_size(model, streams, windows)
    _check_one_batch(windows["train"], training_args)

    training_args = copy.copy(training_args)  # the caller's arguments do not change
    if data_args.carry_state:
        training_args.train_sampling_strategy = "sequential"
    if "validation" in windows:  # a batch size other than the rows would mix windows
        training_args.per_device_eval_batch_size = windows["validation"].num_rows // training_args.world_size
    trainer = LmTrainer(
        model=model,
        args=training_args,
        train_dataset=windows["train"],
        eval_dataset=windows.get("validation"),
        data_collator=collate_windows,
        processing_class=tokenizer,
        carry_state=data_args.carry_state,
    )
    return trainer, run_training(trainer, checkpoint, model_args, data_args)


def _check_one_batch(windows: StreamWindows, training_args) -> None:
    """Check that there is at least one batch: otherwise the Trainer would not make a single step."""
    rows = training_args.per_device_train_batch_size * training_args.world_size
    if training_args.dataloader_drop_last and len(windows) < rows:
        raise InputError(
            f"dataloader_drop_last=True leaves no batch: the text has {len(windows)} windows, and "
            f"per_device_train_batch_size={training_args.per_device_train_batch_size}"
        )


def _check_carry(training_args) -> None:
    """Refuse arguments that would change which rows a batch has."""
    if training_args.auto_find_batch_size:
        raise InputError(
            "auto_find_batch_size=True does not work with carry_state=True, which needs a fixed batch size"
        )
    if training_args.train_sampling_strategy not in ("random", "sequential"):  # "random" is the default
        raise InputError(
            f"train_sampling_strategy={training_args.train_sampling_strategy} does not work with carry_state=True, "
            "which reads the text in order"
        )


def load_streams(
    model_args, data_args, training_args, checkpoint
) -> tuple[PreTrainedTokenizerBase, dict[str, TokenStream]]:
    """Load the text of a run and tokenise it.

    Args:
        model_args (LmModelArguments): may name a model, whose tokenizer is then used.
        data_args (DataArguments): the text and the tokenizer.
        training_args (MoeTrainingArguments): the training arguments.
        checkpoint (str | None): the checkpoint to resume from, whose tokenizer is then used.

    Returns:
        The tokenizer, and the token streams "train" and, with validation text, "validation".

    Raises:
        InputError: training text is missing, validation text is missing although `eval_strategy` needs it, or text
            cannot be read.
    """
    parts = ["train"]
    if data_args.validation_files or (data_args.dataset_name and data_args.validation_split):
        load_metric("stream_perplexity")  # fails now, not after hours of training
        parts.append("validation")
    elif training_args.eval_strategy != "no":
        raise InputError(f"eval_strategy={training_args.eval_strategy.value} needs validation_files or dataset_name")
    # The other processes read the cache that the first process wrote.
    with local_rank_zero_first(training_args):
        texts = {part: load_text(data_args, part) for part in parts}
    source, argument = tokenizer_source(model_args, data_args, checkpoint)
    tokenizer = broadcast_from_rank_zero(
        lambda: load_or_train_tokenizer(
            source,
            texts["train"],
            kind=data_args.tokenizer_kind,
            vocab_size=data_args.vocab_size,
            argument=argument,
        ),
        training_args,
    )
    with local_rank_zero_first(training_args):
        streams = {
            name: tokenize_to_stream(text, tokenizer, num_proc=data_args.preprocessing_num_workers)
            for name, text in texts.items()
        }
    return tokenizer, streams


def load_text(data_args: DataArguments, part: str) -> Dataset:
    """Load the text of one part of the data.

    Args:
        data_args: the data arguments, which name the text.
        part: "train" or "validation".

    Returns:
        A dataset with one row per line, in the column "text".

    Raises:
        InputError: no text is named, or the text cannot be read.
    """
    is_train, argument = part == "train", f"{part}_files"
    files = getattr(data_args, argument)
    if data_args.dataset_name and not files:
        source = {
            "hub_name": data_args.dataset_name,
            "hub_config": data_args.dataset_config_name,
            "split": data_args.train_split if is_train else data_args.validation_split,
            "text_column": data_args.text_column,
        }
    else:
        source = {"files": files}
        if not files:
            raise InputError(f"{argument} is empty: name text files, or a dataset_name")
    return load_text_dataset(
        **source,
        keep_empty_lines=data_args.keep_empty_lines,
        max_lines=data_args.max_train_lines if is_train else None,
        cache_dir=data_args.cache_dir,
        num_proc=data_args.preprocessing_num_workers,
        argument=argument,
    )


def cut_windows(streams, data_args: DataArguments, training_args: MoeTrainingArguments) -> dict[str, StreamWindows]:
    """Cut each stream into windows. Evaluation, and training with a carried state, read several rows in parallel.

    Args:
        streams (dict[str, TokenStream]): {part of the data: stream}.
        data_args: has window_length and carry_state.
        training_args: has the batch sizes.

    Raises:
        InputError: a stream is too short.
    """
    processes = training_args.world_size
    rows = {"train": None, "validation": training_args.per_device_eval_batch_size * processes}
    if data_args.carry_state:
        steps = training_args.gradient_accumulation_steps
        rows["train"] = training_args.per_device_train_batch_size * steps * processes
    if "validation" in streams:  # a short text has fewer rows than the batch size
        longest = (len(streams["validation"]) - 1) // data_args.window_length
        rows["validation"] = max(processes, min(rows["validation"], longest // processes * processes))
    windows = {}
    for name, stream in streams.items():
        try:
            windows[name] = StreamWindows(stream, data_args.window_length, rows[name])
        except InputError as error:
            raise InputError(f"{name} text: {error}") from error
    return windows


def log_model_size(model, streams, windows) -> None:
    """Log the size of the data and of the model."""
    for name, stream in streams.items():
        logger.info(
            f"{name}: {stream.num_lines:,} lines, {stream.num_words:,} words with end-of-sentence, "
            f"{len(stream):,} tokens, {len(windows[name]):,} windows"
        )
    total = model.num_parameters()
    softmax = math.prod(model.lm_head.weight.shape) * (1 if model.config.tie_word_embeddings else 2)
    rest = total - softmax
    logger.info(f"model: {total / 1e6:.2f} M parameters, {rest / 1e6:.2f} M without embedding and softmax")
