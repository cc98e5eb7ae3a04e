"""Train an LSTM-MoE language model: text files in, a model folder with tokenizer and history out."""

import logging
import math
import sys
from pathlib import Path

from datasets import disable_progress_bars
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.utils import logging as transformers_logging

from ..errors import InputError
from ..evaluation.metrics import load_metric
from ..models.configuration_lstm_moe import LstmMoeConfig
from ..models.modeling_lstm_moe import LstmMoeForCausalLM
from .arguments import DataArguments, LmTrainingArguments, ModelArguments
from .callbacks import AuxLossCallback
from .checkpoints import check_same_run, prepare_output_dir
from .optimizer import OptimizerSizeCallback
from .text_data import load_text_dataset, tokenize_to_stream
from .tokenizers import load_or_train_tokenizer
from .trainer import LmTrainer
from .windows import StreamWindows, collate_windows

logger = logging.getLogger(__name__)


def train_lm(
    model_args: ModelArguments, data_args: DataArguments, training_args: LmTrainingArguments
) -> tuple[LmTrainer, dict[str, float]]:
    """Train as told, evaluate, and save the model, its tokenizer and the history into `output_dir`.

    Returns:
        the trainer, and the last evaluation's metrics (empty without validation text).

    Raises:
        InputError: something in the arguments or the data is wrong.
        NonFiniteLossError: the training diverged.
    """
    checkpoint = prepare_output_dir(training_args.output_dir, training_args.resume_from_checkpoint)
    set_seed(training_args.seed)
    transformers_logging.get_logger("transformers").setLevel(training_args.get_process_log_level())
    if not sys.stderr.isatty():  # in a log file the bars only hide the messages
        disable_progress_bars()
        transformers_logging.disable_progress_bar()

    tokenizer, streams = load_streams(model_args, data_args, training_args, checkpoint)
    model = load_model(model_args, tokenizer, on_cpu=training_args.device.type == "cpu")
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
    AuxLossCallback(
        history_file=Path(training_args.output_dir) / "expert_history.csv",
        importance_loss_coef_schedule=training_args.importance_loss_coef_schedule,
        load_loss_coef_schedule=training_args.load_loss_coef_schedule,
    ).attach_to(trainer)
    trainer.add_callback(OptimizerSizeCallback())

    if checkpoint or training_args.should_save:  # every process checks, so that none waits for one that stopped
        check_same_run(training_args.output_dir, checkpoint, course_of_run(model_args, data_args, training_args))
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = {}
    if "validation" in windows:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    return trainer, metrics


def course_of_run(model_args, data_args, training_args) -> dict:
    """The arguments that decide which weights a run ends with, but for when it ends."""
    names = ["per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "seed", "data_seed", "optim"]
    names += ["learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"]
    names += ["lr_scheduler_type", "warmup_steps", "importance_loss_coef_schedule", "load_loss_coef_schedule"]
    names += ["bf16", "fp16"]
    aside = ("validation_files", "validation_split", "preprocessing_num_workers", "cache_dir")
    return {
        **{name: value for name, value in vars(model_args).items() if name != "recompute_experts"},
        **{name: value for name, value in vars(data_args).items() if name not in aside},
        **{name: getattr(training_args, name) for name in names},
    }


def load_streams(model_args, data_args, training_args, checkpoint):
    """The tokenizer, and the token streams "train" and (when there is such text) "validation"."""
    texts = {"train": _load_text(data_args, "train")}
    if data_args.validation_files or (data_args.dataset_name and data_args.validation_split):
        load_metric("stream_perplexity")  # better now than after hours of training
        texts["validation"] = _load_text(data_args, "validation")
    elif training_args.eval_strategy != "no":
        raise InputError(f"eval_strategy={training_args.eval_strategy.value} needs validation_files or dataset_name")
    # A resumed run has its tokenizer in the checkpoint, a fine-tuned model beside its weights.
    source = checkpoint or data_args.tokenizer_name_or_path or model_args.model_name_or_path
    with training_args.main_process_first(desc="tokenisation"):
        tokenizer = load_or_train_tokenizer(
            source, texts["train"], kind=data_args.tokenizer_kind, vocab_size=data_args.vocab_size
        )
        streams = {
            name: tokenize_to_stream(text, tokenizer, num_proc=data_args.preprocessing_num_workers)
            for name, text in texts.items()
        }
    return tokenizer, streams


def _load_text(data_args: DataArguments, part: str):
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


def load_model(model_args: ModelArguments, tokenizer, on_cpu: bool) -> LstmMoeForCausalLM:
    """A new model for the tokenizer's vocabulary, or the checkpoint named, which must fit the tokenizer."""
    # "eager" adds up in the same order every time; on a CPU it is as fast as the others.
    implementation = model_args.experts_implementation or ("eager" if on_cpu else None)
    path = model_args.model_name_or_path
    if path is None:
        config = new_config(model_args, tokenizer)
        config._experts_implementation = implementation
        try:
            return LstmMoeForCausalLM(config)
        except ValueError as error:
            raise InputError(_reason(error)) from error
    try:
        config = AutoConfig.from_pretrained(path, **model_args.config_arguments())
        config.validate()
        model = AutoModelForCausalLM.from_pretrained(path, config=config, experts_implementation=implementation)
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        raise InputError(f"model_name_or_path={path}: cannot be loaded ({_reason(error)})") from error
    if not isinstance(model, LstmMoeForCausalLM):
        raise InputError(f"model_name_or_path={path} is a {type(model).__name__}, expected a LstmMoeForCausalLM")
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, more than vocab_size={model.config.vocab_size} of the model "
            f"{path}"
        )
    return model


def _reason(error: Exception) -> str:
    """The first line of the message; a configuration's own is the cause of the library's."""
    cause = error.__cause__ if isinstance(error, StrictDataclassError) else None
    return str(cause or error).strip().partition("\n")[0]


def new_config(model_args: ModelArguments, tokenizer) -> LstmMoeConfig:
    """The configuration of a new model, with the tokenizer's vocabulary and special tokens."""
    try:
        return LstmMoeConfig(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **model_args.config_arguments(),
        )
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise InputError(_reason(error)) from error


def cut_windows(streams, data_args: DataArguments, training_args: LmTrainingArguments) -> dict[str, StreamWindows]:
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
