"""Trains a GNMT-MoE translation model: from sentence pairs to a folder with model, tokenizer and history."""

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.arguments import TranslationDataArguments
from ..data.cache_folder import cached_in
from ..data.sentence_pairs import load_sentence_pairs
from ..data.token_batches import TokenBatchSampler
from ..data.tokenized_pairs import column_to_numpy, leave_out_long_pairs, tokenize_pairs
from ..data.translation_tokenizers import load_or_train_translation_tokenizer
from ..distributed.waiting import broadcast_from_rank_zero, local_rank_zero_first
from ..errors import InputError, first_line
from ..evaluation.bleu_tokenizers import check_tokenizer
from ..evaluation.held_out_pairs import EvaluationPairs, evaluation_batches, evaluation_pairs
from ..evaluation.metrics import load_metric
from ..families import TRANSLATION_MODELS
from ..models.modeling_gnmt_moe import GnmtMoeForConditionalGeneration
from .arguments import TranslationModelArguments, TranslationTrainingArguments
from .run_checks import TRANSLATION_METRICS
from .run_start import started_run
from .runs import build_model, run_training, tokenizer_source
from .translation_trainer import TranslationTrainer

logger = logging.getLogger(__name__)


def train_translation(
    model_args: TranslationModelArguments,
    data_args: TranslationDataArguments,
    training_args: TranslationTrainingArguments,
    new_model: Callable[[PreTrainedTokenizerBase], PreTrainedModel] | None = None,
) -> tuple[TranslationTrainer, dict[str, float | str]]:
    """Train and evaluate a model, and save the model, its tokenizer and the history into `output_dir`.

    Args:
        model_args: the model arguments.
        data_args: the data arguments.
        training_args: the training arguments.
        new_model: function that makes a model for the tokenizer, for models of other packages
            (`experiments/baselines.py`).

    Returns:
        the trainer, and the metrics of the last evaluation (empty without validation pairs).

    Raises:
        InputError: the arguments or the data are wrong, or another run writes into `output_dir`.
        NonFiniteLossError: the training diverged.
    """
    is_own = new_model is None
    with started_run(
        TRANSLATION_MODELS, model_args, data_args, training_args, TRANSLATION_METRICS, is_own
    ) as checkpoint:
        return _train(model_args, data_args, training_args, new_model, checkpoint)


def _train(
    model_args, data_args, training_args, new_model, checkpoint
) -> tuple[TranslationTrainer, dict[str, float | str]]:
    _check_unused(training_args)
    _check_generation_config(training_args.generation_config)
    check_tokenizer(training_args.tokenize)
    with cached_in(data_args.cache_dir):
        tokenizer, train_tokens, validation = load_pairs(model_args, data_args, training_args, checkpoint)
    if new_model is None:
        model = build_model(
            GnmtMoeForConditionalGeneration,
            AutoModelForSeq2SeqLM,
            model_args,
            data_args,
            training_args,
            tokenizer,
            checkpoint=checkpoint,
            decoder_start_token_id=tokenizer.bos_token_id,
        )
    else:
        model = new_model(tokenizer)
        check_positions(model, train_tokens, None if validation is None else validation.tokens)
    log_model_size(model)

    training_args = copy.copy(training_args)  # the caller's arguments do not change
    training_args.remove_unused_columns = False
    lengths = [column_to_numpy(train_tokens, f"{side}_length") for side in ("source", "target")]
    set_output_length(model, int(lengths[1].max()))
    longest = max(int(side.max()) for side in lengths)
    _check_enough(train_tokens, training_args)
    batches = TokenBatchSampler(
        *lengths,
        data_args.tokens_per_batch,
        seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
        directions=column_to_numpy(train_tokens, "direction"),
        temperature=data_args.sampling_temperature,
        bucket_width=data_args.length_bucket_width,
        # The batches of an optimizer step are adjacent, so that a resumed run may have another number of processes.
        num_processes=training_args.world_size * training_args.gradient_accumulation_steps,
    )
    limit = max(data_args.tokens_per_batch, longest)  # a longer pair is a separate batch
    logger.info(
        f"batches: {len(batches):,} an epoch, of at most {limit:,} tokens a side; the longest pair has {longest:,}"
    )
    trainer = TranslationTrainer(
        model=model,
        args=training_args,
        train_dataset=train_tokens.select_columns(["input_ids", "labels"]),
        eval_dataset=validation,
        train_batch_sampler=batches,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        translate_arguments={"num_beams": training_args.eval_num_beams},
    )
    return trainer, run_training(trainer, checkpoint, model_args, data_args)


# {argument of the library that has no effect here: advice}.
UNUSED = {
    "per_device_train_batch_size": "set tokens_per_batch instead",
    "per_device_eval_batch_size": "set eval_tokens_per_batch instead",
    "train_sampling_strategy": "batches already have sentences of similar length",
    "sortish_sampler": "batches already have sentences of similar length",
    "generation_num_beams": "set eval_num_beams instead",
    "generation_max_length": "the limit of a translation follows from its source",
    "auto_find_batch_size": "set tokens_per_batch instead",
    "dataloader_drop_last": "tokens_per_batch bounds the batches, and none is dropped",
}


def _check_unused(training_args) -> None:
    for name, instead in UNUSED.items():
        if (value := getattr(training_args, name)) != getattr(type(training_args), name):
            raise InputError(f"{name}={value} has no effect here: {instead}")


def _check_enough(tokens: Dataset, training_args) -> None:
    steps, processes = training_args.gradient_accumulation_steps, training_args.world_size
    if len(tokens) < steps * processes:
        raise InputError(
            f"gradient_accumulation_steps={steps} on {processes} processes needs a sentence pair for each micro-batch "
            f"of a step, there are {len(tokens)} pairs"
        )


def _check_generation_config(source) -> None:
    if not isinstance(source, str | Path):
        return
    try:
        GenerationConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"generation_config={source}: cannot be loaded ({first_line(error)})") from error


def check_positions(model: PreTrainedModel, *tokens) -> None:
    """Check that a Transformer has positions for every sentence. The models of this package do not have this limit.

    Args:
        model: the model to train.
        *tokens (Dataset | None): what `tokenize_pairs` returns; None is skipped.

    Raises:
        InputError: a sentence has more tokens than the model has positions.
    """
    positions = getattr(model.config, "max_position_embeddings", math.inf)
    for part in tokens:
        for side in ("source", "target") if part is not None else ():
            longest = int(column_to_numpy(part, f"{side}_length").max())
            if longest > positions:
                raise InputError(f"max_position_embeddings={positions}, but a {side} sentence has {longest} tokens")


def set_output_length(model: PreTrainedModel, longest_target: int) -> None:
    """Set `max_length` of the model's generation configuration, so that `generate()` may write more than 20 tokens.

    The limit is twice the longest training target plus ten, but at most the model's number of positions. A longer
    limit of a fine-tuned model stays.

    Args:
        longest_target: number of tokens in the longest target, including the end.
    """
    length = max(2 * longest_target + 10, model.generation_config.max_length or 0)
    model.generation_config.max_length = min(length, getattr(model.config, "max_position_embeddings", length))


def load_pairs(
    model_args, data_args, training_args, checkpoint
) -> tuple[PreTrainedTokenizerBase, Dataset, EvaluationPairs | None]:
    """Load the sentence pairs of a run and tokenise them.

    Args:
        model_args (TranslationModelArguments): may name a model, whose tokenizer is then used.
        data_args (TranslationDataArguments): the pairs and the tokenizer.
        training_args (TranslationTrainingArguments): the training arguments.
        checkpoint (str | None): the checkpoint to resume from, whose tokenizer is then used.

    Returns:
        The tokenizer, the tokenised training pairs, and the validation pairs or None.

    Raises:
        InputError: training pairs are missing, validation pairs are missing although `eval_strategy` needs them, or
            pairs cannot be read.
    """
    train_sources, validation_sources = data_args.train_sources(), data_args.validation_sources()
    if validation_sources:
        load_metric("sacrebleu_metrics")  # fails now, not after hours of training
    elif training_args.eval_strategy != "no":
        raise InputError(f"eval_strategy={training_args.eval_strategy.value} needs validation pairs")
    # The other processes read the cache that the first process wrote.
    with local_rank_zero_first(training_args):
        train = load_pairs_of("train", train_sources, data_args)
        validation = load_pairs_of("validation", validation_sources, data_args) if validation_sources else None
    source, argument = tokenizer_source(model_args, data_args, checkpoint)
    tokenizer = broadcast_from_rank_zero(
        lambda: load_or_train_translation_tokenizer(
            source,
            train.texts(),
            vocab_size=data_args.vocab_size,
            languages=train.tagged_languages,
            argument=argument,
        ),
        training_args,
    )
    with local_rank_zero_first(training_args):
        tokens = tokenize_pairs(train, tokenizer, num_proc=data_args.preprocessing_num_workers)
        if validation is not None:
            validation = evaluation_pairs(
                validation,
                tokenizer,
                data_args.preprocessing_num_workers,
                tokenize=training_args.tokenize,
                target_files=validation_sources[0].target_files,
            )
    if validation is not None:
        # Refuses pairs that the processes cannot share.
        evaluation_batches(validation, training_args.eval_tokens_per_batch, training_args.world_size)
    tokens, num_long = leave_out_long_pairs(tokens, data_args.max_source_length, data_args.max_target_length)
    logger.info(f"train: {len(tokens):,} pairs kept, {num_long:,} left out as they are too long")
    return tokenizer, tokens, validation


def load_pairs_of(part: str, sources, data_args):
    """Load the pairs of one part of the data, and log their number.

    Args:
        part: "train" or "validation".
        sources (Sequence[PairSource]): the sources of the pairs.
        data_args (TranslationDataArguments): has the limits and the cache folder.
    """
    pairs = load_sentence_pairs(
        sources,
        max_pairs=data_args.max_train_pairs if part == "train" else None,
        cache_dir=data_args.cache_dir,
        num_proc=data_args.preprocessing_num_workers,
        argument=f"{part}_pairs: {{}}" if getattr(data_args, f"{part}_pairs") else f"{part}_{{}}",
    )
    logger.info(f"{part}: {pairs}")
    return pairs


def log_model_size(model) -> None:
    """Log the model's size."""
    total, embedded = model.num_parameters(), sum(p.numel() for n, p in model.named_parameters() if "embed" in n)
    logger.info(f"model: {total / 1e6:.2f} M parameters, {(total - embedded) / 1e6:.2f} M without embeddings")
