"""Train an LSTM-MoE language model: text files in, a model folder with tokenizer and history out."""

import math
from collections.abc import Callable

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..data.text import load_text_dataset, tokenize_to_stream
from ..data.tokenizers import load_or_train_tokenizer
from ..data.windows import StreamWindows, collate_windows
from ..distributed.sharding import check_same_run_everywhere, made_by_first_process
from ..errors import InputError
from ..evaluation.metrics import load_metric
from ..models.modeling_lstm_moe import LstmMoeForCausalLM
from .arguments import DataArguments, ModelArguments, MoeTrainingArguments
from .checkpoints import prepare_output_dir
from .lm_trainer import LmTrainer
from .runs import build_model, course_of_run, quiet_logs, run_training


def train_lm(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: MoeTrainingArguments,
    new_model: Callable[[PreTrainedTokenizerBase], PreTrainedModel] | None = None,
) -> tuple[LmTrainer, dict[str, float]]:
    """Train as told, evaluate, and save the model, its tokenizer and the history into `output_dir`.

    Args:
        model_args, data_args, training_args: what to train, on what, and how.
        new_model: makes a model for the tokenizer, if it is not to be ours (`reference.py`).

    Returns:
        the trainer, and the last evaluation's metrics (empty without validation text).

    Raises:
        InputError: something in the arguments or the data is wrong.
        NonFiniteLossError: the training diverged.
    """
    check_same_run_everywhere(course_of_run(model_args, data_args, training_args), training_args)
    checkpoint = prepare_output_dir(training_args.output_dir, training_args.resume_from_checkpoint)
    set_seed(training_args.seed)
    quiet_logs(training_args)
    tokenizer, streams = load_streams(model_args, data_args, training_args, checkpoint)
    if new_model is None:
        model = build_model(
            LstmMoeForCausalLM, AutoModelForCausalLM, model_args, training_args, tokenizer, checkpoint=checkpoint
        )
    else:
        model = new_model(tokenizer)
    windows = cut_windows(streams, data_args, training_args)
    report(model, streams, windows)

    if data_args.carry_state:
        training_args.train_sampling_strategy = "sequential"
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


def load_streams(model_args, data_args, training_args, checkpoint):
    """The tokenizer, and the token streams "train" and (when there is such text) "validation"."""
    parts = ["train"]
    if data_args.validation_files or (data_args.dataset_name and data_args.validation_split):
        load_metric("stream_perplexity")  # better now than after hours of training
        parts.append("validation")
    elif training_args.eval_strategy != "no":
        raise InputError(f"eval_strategy={training_args.eval_strategy.value} needs validation_files or dataset_name")
    # The other processes find in the cache what the first one has read.
    with training_args.main_process_first(desc="text"):
        texts = {part: load_text(data_args, part) for part in parts}
    # A resumed run has its tokenizer in the checkpoint, a fine-tuned model beside its weights.
    source = checkpoint or data_args.tokenizer_name_or_path or model_args.model_name_or_path
    tokenizer = made_by_first_process(
        lambda: load_or_train_tokenizer(
            source, texts["train"], kind=data_args.tokenizer_kind, vocab_size=data_args.vocab_size
        ),
        training_args,
    )
    with training_args.main_process_first(desc="tokenisation"):
        streams = {
            name: tokenize_to_stream(text, tokenizer, num_proc=data_args.preprocessing_num_workers)
            for name, text in texts.items()
        }
    return tokenizer, streams


def load_text(data_args: DataArguments, part: str):
    """The text of "train" or "validation", a `datasets.Dataset` with a column "text"."""
    is_train = part == "train"
    if data_args.dataset_name:
        source = {
            "hub_name": data_args.dataset_name,
            "hub_config": data_args.dataset_config_name,
            "split": data_args.train_split if is_train else data_args.validation_split,
            "text_column": data_args.text_column,
        }
    else:
        source = {"files": data_args.train_files if is_train else data_args.validation_files}
        if not source["files"]:
            raise InputError("train_files is empty: name text files, or a dataset_name")
    return load_text_dataset(
        **source,
        keep_empty_lines=data_args.keep_empty_lines,
        max_lines=data_args.max_train_lines if is_train else None,
        cache_dir=data_args.cache_dir,
        num_proc=data_args.preprocessing_num_workers,
    )


def cut_windows(streams, data_args: DataArguments, training_args: MoeTrainingArguments) -> dict[str, StreamWindows]:
    """Windows of each stream. Evaluation goes through rows in parallel, and so does training with carried state."""
    processes = training_args.world_size
    rows = {"train": None, "validation": training_args.per_device_eval_batch_size * processes}
    if data_args.carry_state:
        steps = training_args.gradient_accumulation_steps
        rows["train"] = training_args.per_device_train_batch_size * steps * processes
    if "validation" in streams:  # a short text has fewer rows than the batch size
        longest = (len(streams["validation"]) - 1) // data_args.window_length
        rows["validation"] = max(processes, min(rows["validation"], longest // processes * processes))
        training_args.per_device_eval_batch_size = rows["validation"] // processes  # else batches would mix windows
    windows = {}
    for name, stream in streams.items():
        try:
            windows[name] = StreamWindows(stream, data_args.window_length, rows[name])
        except InputError as error:
            raise InputError(f"{name} text: {error}") from error
    return windows


def report(model, streams, windows) -> None:
    """Print what is trained on what."""
    for name, stream in streams.items():
        print(
            f"{name}: {stream.num_lines:,} lines, {stream.num_words:,} words with end-of-sentence, "
            f"{len(stream):,} tokens, {len(windows[name]):,} windows"
        )
    total = model.num_parameters()
    softmax = math.prod(model.lm_head.weight.shape) * (1 if model.config.tie_word_embeddings else 2)
    print(f"model: {total / 1e6:.2f} M parameters, {(total - softmax) / 1e6:.2f} M without embedding and softmax")
