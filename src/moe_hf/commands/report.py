"""Write a page that shows which experts a text uses and what for: how evenly, how surely, which together, and for each
expert the places with the highest gate value (the paper's table 9), to search and to click through.

    moe-hf report LANGUAGE_MODEL FILE [FILE ...] -o report.html
    moe-hf report TRANSLATOR SOURCE_FILE TARGET_FILE -o report.html

The page is one file that needs nothing else, neither a server nor a network; beside it come PNGs of its charts. The
model runs without noise. Of a translation model the encoder reads the sources, and the decoder the translations in
TARGET_FILE, as in training. The balance over the training comes from expert_history.csv in the model's folder.
"""

from ..routing.report import routing_report
from ..value_checks import MOST_CONTEXTS
from . import command_parser, run_command
from .parser import count, whole


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("report", __doc__)
    parser.add_argument("model", help="folder or Hub name of the model and its tokenizer")
    parser.add_argument("files", nargs="+", help="text files: plain, .gz, .xz; for a translation model two, aligned")
    parser.add_argument("-o", "--output", default="routing_report.html", help="default: routing_report.html")
    parser.add_argument(
        "--layers", nargs="+", metavar="LAYER", help="only these, such as layers.1 or decoder.layers.1 (default: all)"
    )
    parser.add_argument("--max_tokens", type=count, default=200_000, help="read at most (default: 200000)")
    parser.add_argument(
        "--num_contexts", type=whole(1, MOST_CONTEXTS), default=8, help="places shown for each expert (default: 8)"
    )
    parser.add_argument(
        "--context_width", type=whole(1, MOST_CONTEXTS), default=6, help="tokens shown on either side (default: 6)"
    )
    parser.add_argument("--history", metavar="CSV", help="expert_history.csv of the training, if elsewhere")
    parser.add_argument("--batch_size", type=count, default=16, help="rows or pairs at once (default: 16)")
    parser.add_argument(
        "--window_length", type=count, default=64, help="language models: tokens at once (default: 64)"
    )
    parser.add_argument(
        "--no_carry_state", action="store_true", help="language models: start every window from a state of zero"
    )
    parser.add_argument("--target_language", help="multilingual translation models: the language of the second file")

    def report() -> dict:
        arguments = vars(parser.parse_args(argv))
        arguments["carry_state"] = not arguments.pop("no_carry_state")
        return routing_report(**arguments)

    return run_command(report)
