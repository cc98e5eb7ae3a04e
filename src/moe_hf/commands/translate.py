"""Translate the lines of a file or of standard input, and print one translation for each line, in order.

    moe-hf translate MODEL [FILE|-] [--num_beams 4] [--length_alpha 0.2 --coverage_beta 0.2]

With --num_return_sequences N, each input line gives N output lines, best first. --scores prints the score and a tab
before each translation. The command reads --buffer_lines lines at a time and sorts them by length, for efficient
batches; with --buffer_lines 1 it answers each line at once. A line break inside a translation is printed as a space.
"""

import argparse
import sys

from tqdm.auto import tqdm

from ..data.lines import read_lines
from ..evaluation.attention_plot import check_plot_file, plot_attention
from ..families import TRANSLATION_MODELS
from ..loading import load_model_and_tokenizer
from ..old_names import with_new_options
from ..translator import NUM_BEAMS, Translator, move_to_device, on_one_line
from . import command_parser, run_command
from .parser import beams, count, length_exponent, length_weight


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("translate", __doc__)
    parser.add_argument("model", help="folder or Hub name of the model and its tokenizer")
    parser.add_argument(
        "file", nargs="?", default="-", help="text file: plain, .gz or .xz; - for standard input (the default)"
    )
    parser.add_argument("--target_language", help="language to translate into, for a multilingual model")
    parser.add_argument(
        "--num_beams", type=beams, default=NUM_BEAMS, help="beam size; 1 is greedy search (default: %(default)s)"
    )
    parser.add_argument("--num_return_sequences", type=count, default=1, help="translations of each line (default: 1)")
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
    parser.add_argument(
        "--tokens_per_batch", type=count, default=8000, help="token positions of a batch, all beams included"
    )
    parser.add_argument("--buffer_lines", type=count, default=2000, help="lines read at a time (default: 2000)")
    parser.add_argument("--scores", action="store_true", help="print the score before each translation")
    parser.add_argument("--attention_plot", help="PNG file for the attention of the first non-empty translation")
    parser.add_argument("--device", help="device, such as cpu or cuda:1 (default: an accelerator if present)")
    return parser.parse_args(with_new_options(argv, parser))


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: translate(parse(argv)))


def translate(arguments: argparse.Namespace) -> None:
    plot = arguments.attention_plot
    if plot is not None:
        check_plot_file(plot)
    translator = build_translator(arguments)
    lines = read_lines(arguments.file, allow_no_text=True)
    for results in tqdm(translator.translate(lines), unit=" lines", disable=None):
        for found in results:
            text = on_one_line(found.text)
            print(f"{found.score:.4f}\t{text}" if arguments.scores else text, flush=True)
        if plot and results[0].target_ids:
            plot_attention(translator, results[0], plot)
            plot = None
    if plot:
        print(f"attention_plot={plot} was not written: no line has a translation", file=sys.stderr)


def build_translator(arguments: argparse.Namespace) -> Translator:
    model, tokenizer = load_model_and_tokenizer(arguments.model, TRANSLATION_MODELS)
    model = move_to_device(model, arguments.device)
    names = ["target_language", "num_beams", "num_return_sequences", "length_alpha", "coverage_beta", "length_penalty"]
    names += ["tokens_per_batch", "buffer_lines"]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return Translator(model, tokenizer, with_scores=arguments.scores, **given)
