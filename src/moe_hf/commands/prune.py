"""Remove or merge the experts that a text uses least, and print the perplexity on that text before and after.

    moe-hf prune LANGUAGE_MODEL FILE [FILE ...] OUT --keep 16
    moe-hf prune TRANSLATOR SOURCE_FILE TARGET_FILE OUT --keep 16 --method merge

The output folder also gets the tokenizer and the generation settings, but not the optimizer state. Use text like the
model's future input, and never test data. `moe-hf evaluate` gives the perplexity on other text.
"""

from ..errors import InputError
from ..evaluation.language_model import measure_lm
from ..evaluation.metrics import load_metric
from ..evaluation.translation_model import measure_translation
from ..hub import save_tokenizer
from ..loading import load_model_and_tokenizer
from ..model_code import add_code
from ..pruning import LOADS, METHODS, prune, sizes_of_pruned
from ..writing import check_new_folder, new_folder
from . import command_parser, printed_on_error, run_command
from .parser import count


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("prune", __doc__)
    parser.add_argument("model", help="folder or Hub name of the model and its tokenizer")
    parser.add_argument("text", nargs="+", help="text files; for a translation model, a source file and a target file")
    parser.add_argument("out", help="new folder for the result")
    parser.add_argument("--keep", type=count, required=True, help="number of experts that each MoE layer keeps")
    parser.add_argument("--method", choices=METHODS, default="prune", help="default: prune")
    parser.add_argument(
        "--load", choices=LOADS, default="tokens", help="how the use of an expert is measured (default: tokens)"
    )
    parser.add_argument(
        "--num_experts_per_tok", type=count, help="experts per token of the result (default: unchanged)"
    )
    parser.add_argument("--target_language", help="language of the target file, for a multilingual model")
    return run_command(lambda: prune_folder(**vars(parser.parse_args(argv))))


def prune_folder(model: str, text: list[str], out: str, *, target_language: str | None = None, **options) -> dict:
    """Call `prune` from folder to folder, and return what to print."""
    load_metric("stream_perplexity")  # fails before the text is read, not after
    check_new_folder(out, "out")
    source, tokenizer = load_model_and_tokenizer(model)
    sizes_of_pruned(source, options["keep"], options["num_experts_per_tok"])  # fails before the text is read
    before, totals = _measure(source, tokenizer, text, target_language)
    result = prune(source, totals=totals, **options)
    report = {
        f"{layer}/unused_experts": f"{int((total.tokens == 0).sum())} of {len(total.tokens)}"
        for layer, total in totals.items()
    }
    report["parameters"] = " -> ".join(f"{of.num_parameters() / 1e6:.2f} M" for of in (source, result))
    del source
    after, _ = _measure(result, tokenizer, text, target_language)
    for name in ("perplexity_per_token", "perplexity_per_word"):
        report[name] = " -> ".join(f"{values[f'eval_{name}']:.4f}" for values in (before, after))
    with printed_on_error(report), new_folder(out, "out") as folder:
        result.save_pretrained(folder)
        add_code(folder)
        save_tokenizer(tokenizer, folder)
    return report | {"written to": out}


def _measure(model, tokenizer, text: list[str], target_language: str | None):
    if model.config.is_encoder_decoder:
        if len(text) != 2:
            raise InputError(f"text={' '.join(text)} must be two files for a translation model: source and target")
        return measure_translation(model, tokenizer, *text, target_language)
    if target_language is not None:
        raise InputError(f"target_language={target_language} is for translation models, and this is a language model")
    return measure_lm(model, tokenizer, text)
