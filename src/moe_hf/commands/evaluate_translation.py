"""Print perplexity, BLEU and chrF of a translation model on sentence pairs, with sacrebleu's signatures.

    moe-hf evaluate-translation MODEL SOURCE_FILE TARGET_FILE [--num_beams 4] [--output translations.txt]

Pairs with an empty side are skipped; the --output file has an empty line for each. Evaluations during training use
greedy search (--eval_num_beams 1), so use --num_beams 1 to compare with them.
"""

import sys

from ..evaluation.records import check_recordable, record_evaluation
from ..evaluation.translation_model import evaluate_translation
from ..translator import NUM_BEAMS, on_one_line
from ..writing import check_file, check_not_input, write_file
from . import command_parser, printed_on_error, run_command
from .parser import beams, length_exponent, length_weight

INPUTS = ("model", "source_file", "target_file")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = command_parser("evaluate-translation", __doc__)
    parser.add_argument("model", help="folder or Hub name of the model and its tokenizer")
    parser.add_argument("source_file", help="source text, one sentence a line: plain, .gz, .xz")
    parser.add_argument("target_file", help="reference translations, line by line")
    parser.add_argument("--target_language", help="language of TARGET_FILE, for a multilingual model")
    parser.add_argument(
        "--tokenize",
        help="sacrebleu's tokenizer for BLEU, such as 13a, zh or char (default: chosen by the target language)",
    )
    parser.add_argument(
        "--num_beams", type=beams, default=NUM_BEAMS, help="beam size; 1 is greedy search (default: %(default)s)"
    )
    parser.add_argument(
        "--length_alpha",
        type=length_weight,
        help="GNMT's length normalisation, about 0.2; needs --num_beams of 2 or more",
    )
    parser.add_argument(
        "--coverage_beta",
        type=length_weight,
        help="GNMT's coverage penalty, about 0.2; needs --num_beams of 2 or more",
    )
    parser.add_argument(
        "--length_penalty",
        type=length_exponent,
        help="Transformers' length penalty, for searches without GNMT's score (default: 1)",
    )
    parser.add_argument("--output", help="file for the translations, one line for each source line")
    parser.add_argument(
        "--record", action="store_true", help="save the result in the model's folder, for its model card"
    )

    def evaluate() -> dict:
        arguments = vars(parser.parse_args(argv))
        output, record = arguments.pop("output"), arguments.pop("record")
        arguments = {name: value for name, value in arguments.items() if value is not None}
        if output is not None:
            check_file(output, "output")
            check_not_input(output, "output", {name: arguments[name] for name in INPUTS})
        if record:
            check_recordable(arguments["model"])
        metrics, translations = evaluate_translation(**arguments)
        with printed_on_error(metrics):
            if output is not None:
                write_file(output, "".join(f"{on_one_line(text)}\n" for text in translations), "output")
            if record:
                files = [arguments["source_file"], arguments["target_file"]]
                record_evaluation(arguments["model"], "evaluate-translation", argv, files, metrics)
        return metrics

    return run_command(evaluate)
