"""`moe-hf`: every command of the package under one name."""

import importlib
import os
import signal
import sys
from pathlib import Path

from .version import __version__

# Name and help of each command. Its module in moe_hf.commands has the same name, with _ for -.
COMMANDS = {
    "train-lm": "train a language model on text files or a dataset of the Hub",
    "train-translation": "train a translation model on sentence pairs",
    "translate": "translate the lines of a file or of standard input",
    "evaluate": "evaluate a model of either family on your text",
    "evaluate-lm": "print the perplexity of a language model, and the balance of its experts",
    "evaluate-translation": "print BLEU, chrF and perplexity of a translation model",
    "average": "average the weights of the last checkpoints of a training run",
    "upcycle": "make a model with many experts from a trained model with one or a few",
    "prune": "remove or merge the least-used experts, and print the perplexity before and after",
    "report": "write a page that shows which experts a text uses, and what for",
    "table": "print the size and cost of the paper's models beside those of configs/",
    "plan": "estimate memory, communication and time of experts spread over devices",
    "push": "upload a trained model to the Hub, with its code and a model card",
}
HEAD = """usage: moe-hf COMMAND [ARGUMENT ...]

Sparsely-gated mixture-of-experts LSTMs. Commands:
"""
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TAIL = """
`moe-hf COMMAND --help` lists the arguments of a command. The training commands also read a YAML file of arguments; the
command line overrides the file: moe-hf train-lm CONFIG.yaml --learning_rate 1e-3"""


def is_this_program() -> bool:
    """Return whether this process is `moe-hf`, `python -m moe_hf` or a script of a checkout."""
    program = Path(sys.argv[0] if sys.argv else "")
    is_module = program.name == "-m" and sys.orig_argv[sys.orig_argv.index("-m") + 1] == "moe_hf"
    return program.stem == "moe-hf" or is_module or program.resolve().parent == SCRIPTS


def end_when_interrupted(number, frame) -> None:
    """Handle Ctrl-C while the libraries are imported, which takes seconds: there is nothing to save yet."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


# `moe_hf` imports this module first.
if is_this_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_when_interrupted)


def main(argv: list[str] | None = None) -> int:
    """Run the command that the arguments name.

    Args:
        argv: the arguments; by default the command line of this process.

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
        print(f"error: command={arguments[0]!r} is not known, use one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 1
    module = arguments[0].replace("-", "_")
    return importlib.import_module(f"{__package__}.commands.{module}").main(arguments[1:])


def usage() -> str:
    """Return the help text of `moe-hf`, with one line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join([HEAD, *lines, TAIL])
