"""The arguments that say which text or sentence pairs a model is trained on, and how they become batches."""

from dataclasses import dataclass, field

from ..errors import InputError
from .pair_sources import PairSource, read_pair_sources


@dataclass
class DataArguments:
    """The text: files or a `datasets` hub name, the tokenizer, and how the stream of tokens is cut."""

    train_files: list[str] | None = field(
        default=None,
        metadata={"help": "text files, one sentence or paragraph a line: plain, .gz, .xz, globs, ${VARS}"},
    )
    validation_files: list[str] | None = field(default=None, metadata={"help": "text files to evaluate on"})
    dataset_name: str | None = field(default=None, metadata={"help": "name on the Hub, instead of files"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of that dataset"})
    train_split: str = field(default="train", metadata={"help": "split of that dataset to train on"})
    validation_split: str = field(default="validation", metadata={"help": "split of that dataset to evaluate on"})
    text_column: str = field(default="text", metadata={"help": "column of that dataset which holds the text"})
    keep_empty_lines: bool = field(default=True, metadata={"help": "an empty line is an end-of-sentence symbol"})
    max_train_lines: int | None = field(default=None, metadata={"help": "use only that many lines"})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "tokenizer to take; else one is trained"}
    )
    tokenizer_kind: str = field(default="bpe", metadata={"help": "tokenizer to train: bpe or word"})
    vocab_size: int = field(default=16000, metadata={"help": "vocabulary of the tokenizer to train"})
    window_length: int = field(default=35, metadata={"help": "tokens that gradients go back through"})
    carry_state: bool = field(
        default=False,
        metadata={"help": "hand the LSTM state from each window to the next (truncated back-propagation)"},
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "processes that tokenise"})
    cache_dir: str | None = field(default=None, metadata={"help": "where tokenised text is kept"})


@dataclass
class TranslationDataArguments:
    """Sentence pairs: one source of them by the flat arguments, or any number by `train_pairs`; tokenizer; batches."""

    train_source_files: list[str] | None = field(
        default=None,
        metadata={"help": "text files, a sentence a line: plain, .gz, .xz, globs, ${VARS}; with train_target_files"},
    )
    train_target_files: list[str] | None = field(default=None, metadata={"help": "their translations, line by line"})
    train_files: list[str] | None = field(
        default=None, metadata={"help": "files of both sides instead: .tsv or .jsonl, also .gz and .xz"}
    )
    validation_source_files: list[str] | None = field(default=None, metadata={"help": "text files to evaluate on"})
    validation_target_files: list[str] | None = field(default=None, metadata={"help": "their translations"})
    validation_files: list[str] | None = field(default=None, metadata={"help": "files of both sides instead"})
    dataset_name: str | None = field(default=None, metadata={"help": "name on the Hub, instead of files"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of that dataset"})
    train_split: str = field(default="train", metadata={"help": "split of that dataset to train on"})
    validation_split: str | None = field(
        default="validation", metadata={"help": "split of that dataset to evaluate on"}
    )
    source_language: str | None = field(default=None, metadata={"help": "language translated from, such as en"})
    target_language: str | None = field(default=None, metadata={"help": "language translated to, such as de"})
    train_pairs: list[dict] | str | None = field(
        default=None,
        metadata={
            "help": "instead of all above, for several directions or corpora: a list of mappings, on the command line "
            'as JSON, e.g. [{"source_files": "a.en", "target_files": "a.de", "source_language": "en", '
            '"target_language": "de"}] or, for all pairs, [{"parallel_files": {"en": "a.en", "de": "a.de"}}]'
        },
    )
    validation_pairs: list[dict] | str | None = field(default=None, metadata={"help": "the same, to evaluate on"})
    max_train_pairs: int | None = field(default=None, metadata={"help": "use only the first pairs of each source"})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "tokenizer to take; else one is trained"}
    )
    vocab_size: int = field(default=32000, metadata={"help": "vocabulary of the tokenizer to train, all languages"})
    max_source_length: int | None = field(
        default=None, metadata={"help": "training pairs with more source tokens are left out, and counted"}
    )
    max_target_length: int | None = field(
        default=None, metadata={"help": "training pairs with more target tokens are left out, and counted"}
    )
    tokens_per_batch: int = field(
        default=16000,
        metadata={"help": "tokens of a batch and process, padding included, on the longer side of each pair"},
    )
    length_bucket_width: int = field(
        default=1, metadata={"help": "pairs whose lengths differ by less are mixed; more means more padding"}
    )
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "T: a direction with n pairs is drawn in proportion to n^(1/T)"}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "processes that tokenise"})
    cache_dir: str | None = field(default=None, metadata={"help": "where text and tokens are kept"})

    def train_sources(self) -> list[PairSource]:
        """Where the training pairs are.

        Raises:
            InputError: nowhere, or in two ways at once.
        """
        sources = self._sources("train", self.train_split)
        if not sources:
            raise InputError(
                "no training data: name train_source_files and train_target_files, train_files, train_pairs or a "
                "dataset_name"
            )
        return sources

    def validation_sources(self) -> list[PairSource]:
        """Where the pairs to evaluate on are, if there are any."""
        return self._sources("validation", self.validation_split)

    def _sources(self, part: str, split: str | None) -> list[PairSource]:
        names = [f"{part}_source_files", f"{part}_target_files", f"{part}_files"]
        flat = {name: getattr(self, name) for name in names if getattr(self, name)}
        if self.dataset_name and (part == "train" or not flat):
            flat |= {"dataset_name": self.dataset_name}
        if pairs := getattr(self, f"{part}_pairs"):
            if flat and (part == "train" or "dataset_name" not in flat):
                raise InputError(f"{part}_pairs and {', '.join(flat)} are given, only one of them is allowed")
            return read_pair_sources(pairs, f"{part}_pairs")
        if not flat or (split is None and "dataset_name" in flat):
            return []
        options = {"dataset_config_name": self.dataset_config_name, "split": split} if self.dataset_name else {}
        languages = {"source_language": self.source_language, "target_language": self.target_language}
        fields = {name.removeprefix(f"{part}_"): value for name, value in flat.items()}
        try:
            return [PairSource(**fields, **options, **languages)]
        except InputError as error:
            raise InputError(f"{part} data: {error}") from error
