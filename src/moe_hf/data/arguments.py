"""The arguments that say which text or sentence pairs a model is trained on, and how they become batches."""

from dataclasses import dataclass, field

from ..errors import InputError
from ..value_checks import COUNT, LARGEST_FACTOR, MOST_PROCESSES, POSITIVE, Range, check_choice, check_range
from .pair_sources import PairSource, read_pair_sources

MOST_TOKENS = 10**8  # of a vocabulary; the library's trainers reserve memory for as many
RANGES = {
    "vocab_size": Range(least=1, most=MOST_TOKENS),
    "preprocessing_num_workers": Range(least=1, most=MOST_PROCESSES),
    "sampling_temperature": POSITIVE,
    **dict.fromkeys(("window_length", "max_train_lines", "max_train_pairs"), COUNT),
    **dict.fromkeys(("max_source_length", "max_target_length"), COUNT),
    **dict.fromkeys(("tokens_per_batch", "length_bucket_width"), Range(least=1, most=LARGEST_FACTOR)),
}
TOKENIZER_KINDS = ("bpe", "word")


def _check(arguments) -> None:
    """Check ranges, and that no argument describes a data set of the Hub when none is named."""
    for name, value in vars(arguments).items():
        if name in RANGES:
            check_range(name, value, RANGES[name])
    if arguments.dataset_name:
        return
    for name in ("dataset_config_name", "train_split", "validation_split", "text_column"):
        value, default = getattr(arguments, name, None), getattr(type(arguments), name, None)
        if value not in (None, default):
            raise InputError(f"{name}={value!r} is of a data set of the Hub, and needs dataset_name")


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
    validation_split: str | None = field(
        default="validation", metadata={"help": "split of that dataset to evaluate on, without validation_files"}
    )
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

    def __post_init__(self):
        _check(self)
        check_choice("tokenizer_kind", self.tokenizer_kind, TOKENIZER_KINDS)
        if self.dataset_name and self.train_files:
            raise InputError(
                f"train_files={self.train_files} and dataset_name={self.dataset_name!r} are given, only one of them "
                "is allowed"
            )


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

    def __post_init__(self):
        _check(self)

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
            sources = read_pair_sources(pairs, f"{part}_pairs")
            self._check_languages(sources, part)
            return sources
        if not flat or (split is None and "dataset_name" in flat):
            return []
        self._check_origin(flat, names)
        options = {"dataset_config_name": self.dataset_config_name, "split": split} if self.dataset_name else {}
        languages = {"source_language": self.source_language, "target_language": self.target_language}
        fields = {name.removeprefix(f"{part}_"): value for name, value in flat.items()}
        try:
            return [PairSource(**fields, **options, **languages)]
        except InputError as error:
            raise InputError(f"{part} data: {error}") from error

    @staticmethod
    def _check_origin(flat: dict, names: list[str]) -> None:
        """The rules of `PairSource`, under the names of the flat arguments."""
        sides = names[:2]
        for one, other in (sides, sides[::-1]):
            if one in flat and other not in flat:
                raise InputError(f"{one}={flat[one]} needs {other} as well")
        origins = [name for name in flat if name != sides[1]]
        if len(origins) > 1:
            raise InputError(f"{' and '.join(origins)} are given, only one of them is allowed")

    def _check_languages(self, sources: list[PairSource], part: str) -> None:
        """A flat language is not that of a mapping, which names its own."""
        for name in ("source_language", "target_language"):
            given = getattr(self, name)
            if given and not all(getattr(source, name) for source in sources):
                raise InputError(f"{name}={given!r} is not for {part}_pairs: write it into each mapping there")
