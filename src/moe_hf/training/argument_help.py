"""The help of the training commands: this package's arguments in groups; `--help-all` adds Transformers' arguments."""

import argparse
import json
from collections.abc import Iterator

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

USAGE = "%(prog)s [CONFIG.yaml] [--name value ...]"
FILE_AND_COMMAND_LINE = (
    "CONFIG.yaml has one line `name: value` for each argument. The command line overrides the file. A name may be "
    "written with - instead of _. A switch without a value means true."
)
SHORT_END = "{prog} --help-all also lists Transformers' {number} other TrainingArguments, which are accepted too."
ALL_END = "Each switch that is true by default has a form --no_NAME, which turns it off."
REST = "other arguments of Transformers' TrainingArguments"
# {group: {argument of TrainingArguments in the short help: help, or None for that of the field}}.
TRAINING_GROUPS: dict[str, dict[str, str | None]] = {
    "output, checkpoints and logs": {
        "output_dir": "folder for the model, its checkpoints and the history; by default trainer_output",
        "resume_from_checkpoint": "continue an interrupted run. Without a value, or with `last`: from the last "
        "complete checkpoint of output_dir, or from step 0 if it has none. With a folder: from that checkpoint-N. "
        "Without this argument: a new run, which refuses an output_dir that holds an earlier run",
        "logging_steps": "log the loss every so many steps",
        "save_strategy": "when to save a checkpoint: steps, epoch, best or no",
        "save_steps": "save a checkpoint every so many steps",
        "save_total_limit": "number of checkpoints to keep; by default all",
        "report_to": "where else to log: tensorboard, wandb, ...; none for nowhere",
        "push_to_hub": "upload the model to the Hub while training",
        "hub_model_id": "repository of the Hub; by default the name of output_dir",
        "use_cache": None,
    },
    "training": {
        "max_steps": "number of steps; -1 trains for num_train_epochs",
        "num_train_epochs": "passes over the training data",
        "per_device_train_batch_size": "windows in a batch of one process",
        "gradient_accumulation_steps": "batches of one process in a step",
        "learning_rate": "peak learning rate",
        "lr_scheduler_type": None,
        "warmup_steps": "steps in which the learning rate rises from 0; below 1, a share of all steps",
        "constant_steps": None,
        "optim": None,
        "seed": "seed of the weights, the order of the data, dropout and gating noise",
        "weight_decay": "weight decay of the optimizer",
        "max_grad_norm": "norm that gradients are clipped to; 0 turns clipping off",
        "bf16": "compute in bfloat16 where it is safe",
        "use_cpu": "use the CPU although there is a GPU",
    },
    "balancing losses and experts on several devices": {
        "importance_loss_coef_schedule": None,
        "load_loss_coef_schedule": None,
        "balance_across_processes": None,
        "expert_parallel_size": None,
        "expert_gradients": None,
    },
    "evaluation": {
        "eval_strategy": "when to evaluate while training: steps, epoch or no; with validation data, a run also "
        "evaluates at its end",
        "eval_steps": "evaluate every so many steps; by default logging_steps",
        "per_device_eval_batch_size": "windows of one process that are evaluated at once",
        "eval_tokens_per_batch": None,
        "eval_num_beams": None,
        "tokenize": None,
        "metric_for_best_model": "metric that chooses the best checkpoint; by default the loss",
        "early_stopping_patience": None,
        "early_stopping_threshold": None,
        "load_best_model_at_end": "end with the weights of the best checkpoint instead of the last step",
    },
}
_BATCH_SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size")
# Kinds of values, by the end of an argument's name.
_METAVARS = {
    "_files": "FILE",
    "_dir": "FOLDER",
    "_name_or_path": "NAME",
    "_pattern": "LAYER",
    "_checkpoint": "FOLDER",
    "train_pairs": "JSON",
    "validation_pairs": "JSON",
    "_schedule": "JSON",
    "_kwargs": "JSON",
    "variants": "JSON",
    "baselines": "JSON",
}


class TrainingParser(HfArgumentParser):
    """A parser whose help is in groups. `--help-all` lists every argument.

    Args:
        dataclass_types: the argument classes; a class of model arguments has `config_class`.
        prog: the program's name in the help; None: that of this process.
        description: paragraphs at the start of the help, or None; an indented paragraph keeps its lines.
    """

    def __init__(self, dataclass_types: tuple, prog: str | None = None, description: str | None = None):
        super().__init__(
            dataclass_types,
            prog=prog,
            usage=USAGE,
            description=description,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )
        self.shows_all = False
        self.add_argument("--help-all", "--help_all", action=_HelpAll)
        self._describe_arguments()

    def format_help(self) -> str:
        """Return the help; with `shows_all`, also the library's arguments that `TRAINING_GROUPS` does not name."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        for paragraph in [*(self.description or "").split("\n\n"), FILE_AND_COMMAND_LINE]:
            formatter.add_text(paragraph)
        groups = list(self._groups())
        rest = groups[-1][1]
        for title, actions in groups if self.shows_all else groups[:-1]:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(ALL_END if self.shows_all else SHORT_END.format(prog=self.prog, number=len(rest)))
        return formatter.format_help()

    def _describe_arguments(self) -> None:
        """Give each argument its help, its kind of value, and the configuration's default."""
        helps = {name: text for names in TRAINING_GROUPS.values() for name, text in names.items() if text}
        defaults = {}
        for cls in self.dataclass_types:
            if config_class := getattr(cls, "config_class", None):
                config = config_class()
                defaults = {name: getattr(config, name, None) for name in cls.__dataclass_fields__}
        for action in self._actions:
            action.config_default = defaults.get(action.dest)
            action.help = helps.get(action.dest, action.help)
            if not isinstance(action, argparse._HelpAction | _HelpAll):
                action.metavar = action.metavar or _metavar(action)

    def _groups(self) -> Iterator[tuple[str, list[argparse.Action]]]:
        """Yield the title and the arguments of each group; the last has the library's other arguments."""
        actions = {action.dest: action for action in self._actions if not _is_negation(action)}
        training = {}
        for cls in sorted(self.dataclass_types, key=lambda cls: hasattr(cls, "config_class")):  # data before the model
            own = [actions[name] for name in cls.__dataclass_fields__ if name in actions]
            if issubclass(cls, TrainingArguments):
                training = {action.dest: action for action in own}
            elif hasattr(cls, "config_class"):
                yield "model (a model that model_name_or_path names has its own defaults)", own
            else:
                yield "data" if cls.__name__.endswith("DataArguments") else "models to compare", own
        # Translation does not use the library's batch sizes.
        left_out = _BATCH_SIZES if "tokens_per_batch" in actions else ()
        for title, names in TRAINING_GROUPS.items():
            yield title, [training.pop(name) for name in names if name in training and name not in left_out]
        yield REST, list(training.values())


class _HelpAll(argparse.Action):
    def __init__(self, option_strings, dest):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0)

    def __call__(self, parser, namespace, values, option_string=None):
        parser.shows_all = True
        parser.print_help()
        parser.exit()


class _Formatter(argparse.HelpFormatter):
    """Shows each argument under one name, with its default if it has one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text.rstrip() if text.startswith(" ") else super()._fill_text(text, width, indent)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"--{action.dest} {self._format_args(action, action.metavar)}"

    def _get_help_string(self, action: argparse.Action) -> str:
        value = action.default if action.default is not None else action.config_default
        if value in (None, "", [], {}):
            return action.help
        return f"{action.help} (default: {_text(value).replace('%', '%%')})"


def _is_negation(action: argparse.Action) -> bool:
    """Return whether the argument is one of the library's --no_NAME forms."""
    return isinstance(action, argparse._StoreFalseAction)


def _metavar(action: argparse.Action) -> str:
    if action.choices is not None:
        return f"{{{','.join(map(str, action.choices))}}}"
    if action.type is int:
        return "N"
    for end, metavar in _METAVARS.items():
        if action.dest.endswith(end):
            return metavar
    return {float: "X", string_to_bool: "true|false", dict: "JSON"}.get(action.type, "NAME")


def _text(value) -> str:
    """Return a default as the command line and the file accept it."""
    value = getattr(value, "value", value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return json.dumps(value) if isinstance(value, bool | dict) else str(value)
