"""Print the perplexity of a language model on text files, and how evenly the text uses its experts.

moe-hf evaluate-lm MODEL FILE [FILE ...]
"""

import sys

from ..evaluation.language_model import evaluate_lm
from ..evaluation.records import check_recordable, record_evaluation
from . import command_parser, printed_on_error, run_command
from .parser import count


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = command_parser("evaluate-lm", __doc__)
    parser.add_argument("model", help="folder or Hub name of the model and its tokenizer")
    parser.add_argument("files", nargs="+", help="text files: plain, .gz, .xz, globs")
    parser.add_argument("--window_length", type=count, default=64, help="tokens read at once (default: 64)")
    parser.add_argument(
        "--batch_size", type=count, default=16, help="parallel streams that the text is cut into (default: 16)"
    )
    parser.add_argument("--no_carry_state", action="store_true", help="start every window from a zero LSTM state")
    parser.add_argument(
        "--record", action="store_true", help="save the result in the model's folder, for its model card"
    )

    def evaluate() -> dict:
        arguments = parser.parse_args(argv)
        if arguments.record:
            check_recordable(arguments.model)
        metrics = evaluate_lm(
            arguments.model,
            arguments.files,
            window_length=arguments.window_length,
            carry_state=not arguments.no_carry_state,
            batch_size=arguments.batch_size,
        )
        if arguments.record:
            with printed_on_error(metrics):
                record_evaluation(arguments.model, "evaluate-lm", argv, arguments.files, metrics)
        return metrics

    return run_command(evaluate)
