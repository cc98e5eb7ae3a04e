"""The arguments for the training data: text or sentence pairs, tokenizer, and batches."""

from dataclasses import dataclass, field

from ..errors import InputError
from ..value_checks import COUNT, LARGEST_FACTOR, MOST_PROCESSES, POSITIVE, Range, check_choice, check_range
from .pair_sources import PairSource, read_pair_sources

MOST_TOKENS = 10**8  # limit of a vocabulary, because the library's trainers reserve memory for it
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
    """Check ranges, and that arguments for a Hub dataset are only given with dataset_name."""
    for name, value in vars(arguments).items():
        if name in RANGES:
            check_range(name, value, RANGES[name])
    if arguments.dataset_name:
        return
    for name in ("dataset_config_name", "train_split", "validation_split", "text_column"):
        value, default = getattr(arguments, name, None), getattr(type(arguments), name, None)
        if value not in (None, default):
            raise InputError(f"{name}={value!r} is for a dataset of the Hub, and needs dataset_name")


@dataclass
class DataArguments:
    """The arguments of a language model's data: text, tokenizer, and windows of the token stream."""

    train_files: list[str] | None = field(
        default=None,
        metadata={"help": "text files with one sentence or paragraph per line: plain, .gz, .xz, globs, ${VARS}"},
    )
    validation_files: list[str] | None = field(default=None, metadata={"help": "text files to evaluate on"})
    dataset_name: str | None = field(default=None, metadata={"help": "dataset of the Hub, instead of files"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of the Hub dataset"})
    train_split: str = field(default="train", metadata={"help": "split of the Hub dataset to train on"})
    validation_split: str | None = field(
        default="validation",
        metadata={"help": "split of the Hub dataset to evaluate on, if validation_files is not given"},
    )
    text_column: str = field(default="text", metadata={"help": "column of the Hub dataset that has the text"})
    keep_empty_lines: bool = field(
        default=True, metadata={"help": "keep empty lines, each as one end-of-sentence token"}
    )
    max_train_lines: int | None = field(default=None, metadata={"help": "use only the first lines of the text"})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "folder or Hub name of a tokenizer; by default, one is trained"}
    )
    tokenizer_kind: str = field(default="bpe", metadata={"help": "kind of tokenizer to train: bpe or word"})
    vocab_size: int = field(default=16000, metadata={"help": "vocabulary size of the tokenizer to train"})
    window_length: int = field(
        default=35, metadata={"help": "tokens per window, the length of back-propagation through time"}
    )
    carry_state: bool = field(
        default=False,
        metadata={"help": "pass the LSTM state from each window to the next (truncated back-propagation)"},
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "processes that tokenise"})
    cache_dir: str | None = field(default=None, metadata={"help": "folder for tokenised text"})

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
    """The arguments of a translation model's data: sentence pairs, tokenizer, and batches."""

    train_source_files: list[str] | None = field(
        default=None,
        metadata={
            "help": "source texts, one sentence per line: plain, .gz, .xz, globs, ${VARS}; needs train_target_files"
        },
    )
    train_target_files: list[str] | None = field(
        default=None, metadata={"help": "translations of train_source_files, line by line"}
    )
    train_files: list[str] | None = field(
        default=None, metadata={"help": "files with both sides: .tsv or .jsonl, also compressed as .gz or .xz"}
    )
    validation_source_files: list[str] | None = field(default=None, metadata={"help": "source texts to evaluate on"})
    validation_target_files: list[str] | None = field(
        default=None, metadata={"help": "translations of validation_source_files"}
    )
    validation_files: list[str] | None = field(
        default=None, metadata={"help": "files with both sides to evaluate on: .tsv or .jsonl"}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "dataset of the Hub, instead of files"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of the Hub dataset"})
    train_split: str = field(default="train", metadata={"help": "split of the Hub dataset to train on"})
    validation_split: str | None = field(
        default="validation", metadata={"help": "split of the Hub dataset to evaluate on"}
    )
    source_language: str | None = field(default=None, metadata={"help": "code of the source language, such as en"})
    target_language: str | None = field(default=None, metadata={"help": "code of the target language, such as de"})
    train_pairs: list[dict] | str | None = field(
        default=None,
        metadata={
            "help": "several directions or corpora, instead of the arguments above: a list of mappings, as JSON on "
            'the command line. Example: [{"source_files": "a.en", "target_files": "a.de", "source_language": "en", '
            '"target_language": "de"}]. For all directions: [{"parallel_files": {"en": "a.en", "de": "a.de"}}]'
        },
    )
    validation_pairs: list[dict] | str | None = field(
        default=None, metadata={"help": "as train_pairs, to evaluate on"}
    )
    max_train_pairs: int | None = field(default=None, metadata={"help": "use only the first pairs of each source"})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "folder or Hub name of a tokenizer; by default, one is trained"}
    )
    vocab_size: int = field(default=32000, metadata={"help": "vocabulary size of the tokenizer to train"})
    max_source_length: int | None = field(
        default=None, metadata={"help": "leave out training pairs with more source tokens, and print their number"}
    )
    max_target_length: int | None = field(
        default=None, metadata={"help": "leave out training pairs with more target tokens, and print their number"}
    )
    tokens_per_batch: int = field(
        default=16000,
        metadata={"help": "tokens per batch and process, with padding, counting the longer side of each pair"},
    )
    length_bucket_width: int = field(
        default=1,
        metadata={"help": "mix pairs whose lengths differ by less than this; larger values need more padding"},
    )
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "temperature T: directions with n pairs are sampled in proportion to n^(1/T)"}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "processes that tokenise"})
    cache_dir: str | None = field(default=None, metadata={"help": "folder for loaded text and tokens"})

    def __post_init__(self):
        _check(self)

    def train_sources(self) -> list[PairSource]:
        """Return the sources of the training pairs.

        Raises:
            InputError: a source is missing, or sources are given in two ways.
        """
        sources = self._sources("train", self.train_split)
        if not sources:
            raise InputError(
                "no training data: name train_source_files and train_target_files, train_files, train_pairs or a "
                "dataset_name"
            )
        return sources

    def validation_sources(self) -> list[PairSource]:
        """Return the sources of the validation pairs, if there are any."""
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
        """Apply the rules of `PairSource`, under the names of the flat arguments."""
        sides = names[:2]
        for one, other in (sides, sides[::-1]):
            if one in flat and other not in flat:
                raise InputError(f"{one}={flat[one]} needs {other} as well")
        origins = [name for name in flat if name != sides[1]]
        if len(origins) > 1:
            raise InputError(f"{' and '.join(origins)} are given, only one of them is allowed")

    def _check_languages(self, sources: list[PairSource], part: str) -> None:
        """Refuse a flat language with mappings, which must name their languages themselves."""
        for name in ("source_language", "target_language"):
            given = getattr(self, name)
            if given and not all(getattr(source, name) for source in sources):
                raise InputError(f"{name}={given!r} has no effect on {part}_pairs: write it into each mapping there")
