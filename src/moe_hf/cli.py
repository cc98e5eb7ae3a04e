"""`moe-hf`: every command of the package under one name."""

import importlib
import sys

from .version import __version__

# Subcommand, module of moe_hf.commands, what it does.
COMMANDS = {
    "train-lm": ("train_lm", "train a language model on text files or a dataset of the Hub"),
    "train-translation": ("train_translation", "train a translation model on sentence pairs"),
    "translate": ("translate", "translate the lines of a file, or of standard input"),
    "evaluate": ("evaluate", "judge a model of either family on other text"),
    "evaluate-lm": ("evaluate_lm", "perplexity of a language model, and how evenly text uses its experts"),
    "evaluate-translation": ("evaluate_translation", "BLEU, chrF and perplexity of a translation model"),
    "average": ("average", "one model from the last checkpoints of a training run"),
    "upcycle": ("upcycle", "make a model with many experts from a trained one with one or a few"),
    "prune": ("prune", "leave out or merge the least-loaded experts, at a perplexity that is reported"),
    "report": ("report", "a page that shows which experts a text uses, and what for"),
    "table": ("table", "size and cost of the paper's models beside those of configs/"),
    "plan": ("plan", "how a model's experts spread over devices: memory, bytes moved, time"),
    "push": ("push", "put a trained model on the Hub, with its code and a model card"),
}
HEAD = """usage: moe-hf COMMAND [ARGUMENT ...]

Sparsely-gated mixture-of-experts LSTMs. Commands:
"""
TAIL = """
`moe-hf COMMAND --help` tells a command's arguments. The training commands take a YAML file of arguments too, which the
command line overrides: moe-hf train-lm CONFIG.yaml --learning_rate 1e-3"""


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"moe-hf {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"error: command={arguments[0]!r} is none of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"{__package__}.commands.{COMMANDS[arguments[0]][0]}")
    sys.argv = [f"moe-hf {arguments[0]}", *arguments[1:]]  # as the command's own help names itself
    return module.main()


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join([HEAD, *lines, TAIL])
