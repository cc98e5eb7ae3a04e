"""`moe-hf`: every command of the package under one name."""

import importlib
import os
import signal
import sys
from pathlib import Path

from .version import __version__

# What each does; its module in moe_hf.commands has its name, with _ for -.
COMMANDS = {
    "train-lm": "train a language model on text files or a dataset of the Hub",
    "train-translation": "train a translation model on sentence pairs",
    "translate": "translate the lines of a file, or of standard input",
    "evaluate": "judge a model of either family on other text",
    "evaluate-lm": "perplexity of a language model, and how evenly text uses its experts",
    "evaluate-translation": "BLEU, chrF and perplexity of a translation model",
    "average": "one model from the last checkpoints of a training run",
    "upcycle": "make a model with many experts from a trained one with one or a few",
    "prune": "leave out or merge the least-loaded experts, at a perplexity that is reported",
    "report": "a page that shows which experts a text uses, and what for",
    "table": "size and cost of the paper's models beside those of configs/",
    "plan": "how a model's experts spread over devices: memory, bytes moved, time",
    "push": "put a trained model on the Hub, with its code and a model card",
}
HEAD = """usage: moe-hf COMMAND [ARGUMENT ...]

Sparsely-gated mixture-of-experts LSTMs. Commands:
"""
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TAIL = """
`moe-hf COMMAND --help` tells a command's arguments. The training commands take a YAML file of arguments too, which the
command line overrides: moe-hf train-lm CONFIG.yaml --learning_rate 1e-3"""


def is_this_program() -> bool:
    """Whether this process is `moe-hf`, `python -m moe_hf` or a script of a checkout, and not another program."""
    program = Path(sys.argv[0] if sys.argv else "")
    is_module = program.name == "-m" and sys.orig_argv[sys.orig_argv.index("-m") + 1] == "moe_hf"
    return program.stem == "moe-hf" or is_module or program.resolve().parent == SCRIPTS


def end_when_interrupted(number, frame) -> None:
    """Ctrl-C while the libraries are imported, for seconds: there is nothing to save."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


# `moe_hf` imports this module first.
if is_this_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_when_interrupted)


def main(argv: list[str] | None = None) -> int:
    """Run the command that the arguments name.

    Args:
        argv: the arguments, by default those of this process.

    Returns:
        the exit status.
    """
    from .commands.exit_status import exit_status_of

    return exit_status_of(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"moe-hf {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"error: command={arguments[0]!r} is none of {', '.join(COMMANDS)}", file=sys.stderr)
        return 1
    module = arguments[0].replace("-", "_")
    return importlib.import_module(f"{__package__}.commands.{module}").main(arguments[1:])


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join([HEAD, *lines, TAIL])
