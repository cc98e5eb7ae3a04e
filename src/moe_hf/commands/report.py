"""Write an interactive page that shows which experts a text uses, and what for.

The page has the balance, gate entropy and co-activation of the experts. For each expert, it has the places in the text
with the highest gate value, as in the paper's table 9.

    moe-hf report LANGUAGE_MODEL FILE [FILE ...] -o report.html
    moe-hf report TRANSLATOR SOURCE_FILE TARGET_FILE -o report.html

The page is one file that needs neither a server nor a network. PNG files of the charts are written beside the page.
The model runs without noise. The encoder of a translation model reads SOURCE_FILE, and the decoder reads the
translations in TARGET_FILE, as in training. The balance over the training comes from expert_history.csv in the model's
folder.
"""

from ..routing.report import routing_report
from ..value_checks import MOST_CONTEXTS
from . import command_parser, run_command
from .parser import count, whole


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("report", __doc__)
    parser.add_argument("model", help="folder or Hub name of the model and its tokenizer")
    parser.add_argument(
        "files", nargs="+", help="text files: plain, .gz, .xz; for a translation model, two aligned files"
    )
    parser.add_argument(
        "-o", "--output", default="routing_report.html", help="the page (default: routing_report.html)"
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="LAYER",
        help="MoE layers to show, such as layers.1 or decoder.layers.1 (default: all)",
    )
    parser.add_argument(
        "--max_tokens", type=count, default=200_000, help="maximal number of tokens read (default: 200000)"
    )
    parser.add_argument(
        "--num_contexts", type=whole(1, MOST_CONTEXTS), default=8, help="places shown for each expert (default: 8)"
    )
    parser.add_argument(
        "--context_width", type=whole(1, MOST_CONTEXTS), default=6, help="tokens shown on either side (default: 6)"
    )
    parser.add_argument("--history", metavar="CSV", help="expert_history.csv of the training, if it is elsewhere")
    parser.add_argument(
        "--batch_size", type=count, default=16, help="streams of text or sentence pairs at once (default: 16)"
    )
    parser.add_argument(
        "--window_length", type=count, default=64, help="language models: tokens read at once (default: 64)"
    )
    parser.add_argument(
        "--no_carry_state", action="store_true", help="language models: start every window from a zero LSTM state"
    )
    parser.add_argument("--target_language", help="multilingual translation models: the language of the second file")

    def report() -> dict:
        arguments = vars(parser.parse_args(argv))
        arguments["carry_state"] = not arguments.pop("no_carry_state")
        return routing_report(**arguments)

    return run_command(report)
