"""The arguments of a training run: from a YAML file, and overrides from the command line."""

import dataclasses
import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, get_type_hints

import torch
from accelerate.utils import GradientAccumulationPlugin
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..data.arguments import DataArguments
from ..data.paths import expand_path
from ..errors import InputError
from ..evaluation.held_out_pairs import TOKENS_PER_BATCH
from ..evaluation.records import EVAL_NUM_BEAMS
from ..models.configuration_gnmt_moe import GnmtMoeConfig
from ..models.configuration_lstm_moe import LstmMoeConfig
from ..models.configuration_moe import MoeConfig
from ..old_names import with_new_names, with_new_options
from ..value_checks import check_choice, read_json, shown, typed
from ..yaml_file import read_yaml
from .argument_checks import check_training_arguments, plain
from .argument_help import TrainingParser
from .optimizer import FACTORED_ADAM

# Arguments in which `~` and `${VARIABLE}` are expanded, besides data files.
PATH_ARGUMENTS = ("output_dir", "cache_dir", "tokenizer_name_or_path", "model_name_or_path", "resume_from_checkpoint")


@dataclass
class ModelArguments:
    """A model to fine-tune, or the arguments of a new model. The configuration class has the defaults."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "folder or Hub name of a model to fine-tune"}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "width of embedding and layers"})
    lstm_hidden_size: int | None = field(
        default=None,
        metadata={"help": "units of an LSTM cell, whose output is projected to hidden_size; by default hidden_size"},
    )
    dropout: float | None = field(default=None, metadata={"help": "dropout on embedding and layer outputs"})
    num_experts: int | None = field(default=None, metadata={"help": "experts in each MoE layer (n)"})
    num_experts_per_tok: int | None = field(
        default=None, metadata={"help": "experts per token (k); with gating softmax, all experts"}
    )
    moe_intermediate_size: int | None = field(default=None, metadata={"help": "hidden size of an expert (h)"})
    num_expert_layers: int | None = field(default=None, metadata={"help": "hidden layers of an expert"})
    gating: str | None = field(
        default=None, metadata={"help": "gate: noisy_top_k, softmax_top_k, softmax or strictly_balanced"}
    )
    num_expert_groups: int | None = field(
        default=None, metadata={"help": "groups of a hierarchical gate; by default the gate is flat"}
    )
    num_groups_per_tok: int | None = field(
        default=None, metadata={"help": "groups per token, with a hierarchical gate"}
    )
    importance_loss_coef: float | None = field(
        default=None, metadata={"help": "weight of the importance loss (w_importance)"}
    )
    load_loss_coef: float | None = field(default=None, metadata={"help": "weight of the load loss (w_load)"})
    threshold_loss_coef: float | None = field(
        default=None, metadata={"help": "weight of the threshold loss (L_batchwise) of strictly_balanced gates"}
    )
    label_smoothing: float | None = field(default=None, metadata={"help": "label smoothing, while training"})
    tie_word_embeddings: bool | None = field(
        default=None, metadata={"help": "share one matrix in embedding and softmax"}
    )
    scale_embedding: bool | None = field(
        default=None, metadata={"help": "multiply the embedding by sqrt(hidden_size)"}
    )
    initializer_range: float | None = field(
        default=None, metadata={"help": "initial standard deviation of the embedding; by default hidden_size ** -0.5"}
    )
    gate_std: float | None = field(
        default=None,
        metadata={
            "help": "initial standard deviation of the gates' logits; with hundreds of experts and more, 3 to 6 lets "
            "the gates decide from the start"
        },
    )
    recompute_experts: bool | None = field(
        default=None, metadata={"help": "recompute the experts' hidden activations in the backward pass"}
    )
    experts_implementation: str | None = field(
        default=None,
        metadata={"help": "moe_hf (the default: the fastest for the device), eager, triton, batched_mm or grouped_mm"},
    )

    def config_arguments(self) -> dict:
        """Return the arguments of the configuration that were given."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {name: given[name] for name in given if name not in ("model_name_or_path", "experts_implementation")}


@dataclass
class LmModelArguments(ModelArguments):
    """The arguments of a language model's `LstmMoeConfig`."""

    config_class: ClassVar[type[MoeConfig]] = LstmMoeConfig

    layer_pattern: list[str] | None = field(default=None, metadata={"help": "the layers in order, each lstm or moe"})
    num_sampled: int | None = field(
        default=None, metadata={"help": "classes of the sampled softmax while training; by default the full softmax"}
    )
    loss_chunk_size: int | None = field(
        default=None, metadata={"help": "tokens whose logits are in memory at once in the loss; by default all"}
    )


@dataclass
class TranslationModelArguments(ModelArguments):
    """The arguments of a translation model's `GnmtMoeConfig`."""

    config_class: ClassVar[type[MoeConfig]] = GnmtMoeConfig

    encoder_layer_pattern: list[str] | None = field(
        default=None, metadata={"help": "the encoder's layers in order, each lstm or moe"}
    )
    decoder_layer_pattern: list[str] | None = field(
        default=None, metadata={"help": "the decoder's layers in order, each lstm or moe"}
    )
    encoder_bidirectional_first: bool | None = field(
        default=None, metadata={"help": "let the encoder's first layer read in both directions"}
    )
    attention_type: str | None = field(default=None, metadata={"help": "product or additive"})
    attention_feeding: str | None = field(default=None, metadata={"help": "feeding: recurrent, input or parallel"})
    deep_output: bool | None = field(
        default=None,
        metadata={"help": "let the softmax read state, embedding and context through a tanh layer"},
    )
    share_embeddings: bool | None = field(default=None, metadata={"help": "share one embedding for source and target"})


@dataclass
class MoeTrainingArguments(TrainingArguments):
    """Transformers' training arguments with the paper's schedule as default, and arguments of the balancing losses."""

    # Fields that accept JSON on the command line.
    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "importance_loss_coef_schedule",
        "load_loss_coef_schedule",
    ]

    optim: str = field(
        default=TrainingArguments.default_optim,
        metadata={"help": "optimizer: factored_adam (the paper's, appendix D), or one of Transformers' optimizers"},
    )
    lr_scheduler_type: str = field(
        default="inverse_sqrt",
        metadata={
            "help": "schedule of the learning rate: inverse_sqrt (the paper's: warm-up, then 1/sqrt(step)), linear, "
            "cosine, cosine_with_min_lr, polynomial, constant, constant_with_warmup, warmup_stable_decay, "
            "reduce_lr_on_plateau or another of Transformers"
        },
    )
    use_cache: bool = field(default=True, metadata={"help": "value of use_cache in the saved configuration"})
    importance_loss_coef_schedule: dict | str | None = field(
        default=None, metadata={"help": 'w_importance by step, with linear interpolation: {"0": 0.1, "10000": 0.01}'}
    )
    load_loss_coef_schedule: dict | str | None = field(
        default=None, metadata={"help": 'w_load by step, with linear interpolation: {"0": 0.1, "10000": 0.01}'}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "stop after this many evaluations in a row without a better metric_for_best_model; by default "
            "train to the end"
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "change of the metric above which an evaluation counts as better"}
    )
    expert_parallel_size: int = field(
        default=1,
        metadata={
            "help": "processes that share one copy of each expert: a divisor of the number of processes, or -1 for "
            "all of them. The rest of the model is sharded over all processes (FSDP2). 1: every process has every "
            "expert"
        },
    )
    expert_gradients: str = field(
        default="dense",
        metadata={
            "help": "dense or factored. factored (only for optim factored_adam) stores rows instead of full "
            "gradients; its cost depends on the experts that a step uses"
        },
    )
    balance_across_processes: bool = field(
        default=True,
        metadata={"help": "compute importance, load and the strict balance over the global batch of all processes"},
    )
    # Every parameter gets a gradient in every step, including the weights of idle experts.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "look for parameters without a gradient; these models never have any"}
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():  # so that one configuration works on a CPU and on a GPU
            # Without use_cpu the library does not join the processes that torchrun has started.
            is_launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
            self.use_cpu = self.use_cpu or self.bf16 or self.bf16_full_eval or is_launched
            self.tf32 = None
        check_training_arguments(self)
        if self.early_stopping_patience is not None and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        # The library's default is True for all metrics except a loss.
        if self.greater_is_better is None and "per_" in (self.metric_for_best_model or ""):
            self.greater_is_better = False
        optim = plain(self.optim)
        if optim == FACTORED_ADAM:  # the library's check only knows its own names
            self.optim = TrainingArguments.default_optim
        super().__post_init__()
        if optim == FACTORED_ADAM:
            self.optim = FACTORED_ADAM
        if plain(self.lr_scheduler_type) in ("reduce_lr_on_plateau", "greedy") and self.greater_is_better:
            # The library would take a rising metric for a worse one.
            self.lr_scheduler_kwargs = {"mode": "max"} | (self.lr_scheduler_kwargs or {})
        if self.expert_gradients not in ("dense", "factored"):
            raise InputError(f"expert_gradients={self.expert_gradients!r} must be dense or factored")
        if self.expert_gradients == "factored":
            needed = {"optim": FACTORED_ADAM, "fp16": False, "fsdp": []}
            for name, value in needed.items():
                if (getattr(self, name) or value) != value:
                    raise InputError(f"expert_gradients=factored needs {name}={value}, not {getattr(self, name)}")
        size = self.expert_parallel_size
        if size < -1 or size == 0:
            raise InputError(f"expert_parallel_size={size} must be at least 1, or -1 for all processes")
        if size != 1 and self.fsdp:
            raise InputError(f"expert_parallel_size={size} shards the whole model; fsdp={self.fsdp} must be left out")


@dataclass
class TranslationTrainingArguments(MoeTrainingArguments, Seq2SeqTrainingArguments):
    """The training arguments of translation models."""

    constant_steps: int = field(
        default=0, metadata={"help": "steps at the peak learning rate between warm-up and 1/sqrt(step) (paper: 8000)"}
    )
    eval_tokens_per_batch: int = field(
        default=TOKENS_PER_BATCH, metadata={"help": "tokens of an evaluation batch for perplexity"}
    )
    eval_num_beams: int = field(
        default=EVAL_NUM_BEAMS,
        metadata={"help": "beam size in evaluations; 1 is greedy search (moe-hf evaluate-translation uses 4)"},
    )
    tokenize: str | None = field(
        default=None,
        metadata={
            "help": "sacrebleu's tokenizer for BLEU, such as 13a, zh or char; by default, the target language's"
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.constant_steps and self.lr_scheduler_type != "inverse_sqrt":
            raise InputError(
                f"constant_steps={self.constant_steps} needs lr_scheduler_type=inverse_sqrt, "
                f"not {plain(self.lr_scheduler_type)}"
            )


def parse_arguments(
    argv: list[str],
    dataclasses_: tuple = (LmModelArguments, DataArguments, MoeTrainingArguments),
    *,
    prog: str | None = None,
    description: str | None = None,
    keywords: dict | None = None,
) -> tuple:
    """Read `CONFIG.yaml [--name value ...]` into the argument classes; the command line overrides the file.

    `~` and `${VARIABLE}` are expanded here in `PATH_ARGUMENTS`, and in data files when they are read.

    Args:
        argv: the command line, without the program's name.
        dataclasses_: the argument classes.
        prog: the program's name in the help.
        description: paragraphs at the start of the help.
        keywords: {argument: Python value}; keywords override the file.

    Returns:
        an instance of each class.

    Raises:
        InputError: the file is missing or is not a mapping, an argument is not known, or a value is not allowed.
    """
    parser = _parser(dataclasses_, prog, description)
    argv = with_new_options(argv, parser)
    if argv and not argv[0].startswith("-"):
        parser.set_defaults(**_known_arguments(read_yaml(argv[0]), dataclasses_, where=f"{argv[0]}: "))
        argv = argv[1:]
    if keywords:
        parser.set_defaults(**_known_arguments(keywords, dataclasses_))
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0], names, n=1)
        raise InputError(f"no argument is named {unknown[0]!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    parsed = [_built(cls, vars(given)) for cls in dataclasses_]
    for arguments in parsed:
        for name in PATH_ARGUMENTS:
            if isinstance(path := getattr(arguments, name, None), str):
                setattr(arguments, name, expand_path(path, name))
    return tuple(parsed)


def changed_arguments(*parsed) -> dict:
    """Return the arguments that differ from the defaults, as plain values for a YAML file that repeats the run.

    Args:
        *parsed (object): instances of the argument classes.
    """
    changed = {}
    for arguments in parsed:
        is_training = isinstance(arguments, TrainingArguments)
        values = arguments.to_dict() if is_training else vars(arguments)
        for field_ in dataclasses.fields(arguments):
            default, value = _default(field_), values[field_.name]
            # The library replaces some defaults with False or an empty list.
            is_default = default in (None, "", "none") and (value is False or value == [])
            if value != default and not (is_training and is_default):
                changed[field_.name] = value
        if is_training:
            if arguments.accelerator_config == AcceleratorConfig():
                changed.pop("accelerator_config", None)
            if arguments.use_cpu:
                changed.pop("dataloader_pin_memory", None)
    for name in ("resume_from_checkpoint", "hub_token"):
        changed.pop(name, None)
    return changed


def _parser(dataclasses_: tuple, prog: str | None, description: str | None) -> TrainingParser:
    """Return a parser without types and choices: `_built` checks values from the command line, file and keywords."""
    parser = TrainingParser(dataclasses_, prog=prog, description=description)
    defaults = {field_.name: _default(field_) for cls in dataclasses_ for field_ in dataclasses.fields(cls)}
    for action in parser._actions:
        if action.default is None:  # the library drops the default of list arguments
            action.default = defaults.get(action.dest)
        if action.dest == "resume_from_checkpoint":  # without a value, it means the last checkpoint
            action.nargs, action.const = "?", "last"
        action.type = action.choices = None
    parser.error = _refuse
    return parser


def _refuse(message: str):
    """Raise an InputError where argparse would print its usage and exit."""
    raise InputError(message.removeprefix("argument "))


def _built(cls: type, values: dict):
    """Return an instance of an argument class; its annotations check the values."""
    annotations, checked = get_type_hints(cls), {}
    for field_ in dataclasses.fields(cls):
        if not field_.init:
            continue
        name, value = field_.name, values[field_.name]
        is_switch = name in ("resume_from_checkpoint", "fsdp") and isinstance(value, bool)  # these accept text too
        checked[name] = value if is_switch else typed(name, value, annotations[name])
        needs_text = not issubclass(cls, TrainingArguments) or name in (*PATH_ARGUMENTS, "tokenize")
        is_empty = isinstance(checked[name], str | list) and not checked[name]
        if needs_text and is_empty and value != _default(field_):
            raise InputError(f"{name}={shown(value)} is empty: give a value, or leave {name} out")
    _check_mappings(checked)
    try:
        return cls(**checked)
    except InputError:
        raise
    except Exception as error:  # the library's checks raise many kinds of errors
        raise InputError(" ".join(f"{error}".split()) or type(error).__name__) from error


def _check_mappings(values: dict) -> None:
    """Check arguments that are mappings or files: the library opens any other text as a file, or fails late."""
    for name, value in values.items():
        if name == "accelerator_config" and value is not None:
            _check_accelerator(value)
        if not isinstance(value, str) or value.lstrip().startswith("{"):
            continue
        if name in ("accelerator_config", "fsdp_config"):
            if not Path(value).is_file():
                raise InputError(f"{name}={shown(value)} must be a mapping as JSON, or a file of it, which is missing")
        elif name in MoeTrainingArguments._VALID_DICT_FIELDS and name != "deepspeed":
            raise InputError(f"{name}={shown(value)} must be a mapping, on the command line as JSON")


def _check_accelerator(values: dict | str | AcceleratorConfig) -> None:
    if isinstance(values, str) and values.lstrip().startswith("{"):
        values = read_json("accelerator_config", values)
    annotations = get_type_hints(AcceleratorConfig)
    for name, value in values.items() if isinstance(values, dict) else ():
        if name not in annotations:
            raise InputError(f"accelerator_config: no field is named {name!r}, use one of {', '.join(annotations)}")
        typed(f"accelerator_config {name}", value, annotations[name])
    known = [field_.name for field_ in dataclasses.fields(GradientAccumulationPlugin)]
    accumulation = values.get("gradient_accumulation_kwargs") if isinstance(values, dict) else None
    for name in accumulation or {}:
        check_choice("accelerator_config gradient_accumulation_kwargs", name, known)


def _default(field_: dataclasses.Field):
    return field_.default_factory() if field_.default is dataclasses.MISSING else field_.default


def _known_arguments(values: dict, dataclasses_: tuple, where: str = "") -> dict:
    """Return the values under the arguments' new names; raise an InputError for an unknown name."""
    known = {f.name for cls in dataclasses_ for f in dataclasses.fields(cls) if f.init}
    values = with_new_names(values, known, where=where)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise InputError(
                f"{where}no argument is named {name!r}" + (f", did you mean {near[0]!r}?" if near else "")
            )
    return values
