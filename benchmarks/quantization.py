#!/usr/bin/env python3
"""int8 weights against float32: bytes, time of generation, and differences on real text.

    python benchmarks/quantization.py [--output benchmarks/results/quantization.md]
        [--lm FOLDER --lm_text FILE] [--translator FOLDER --source FILE --target FILE]

Sizes and times are measured on models with random weights. The variants generate in turn, in one process. Time is
processor time with one thread, so that other processes on the machine count less. The first table needs trained
models. It shows the perplexities, and the mean over all tokens of the divergence KL(p || q) in nats, where q is the
quantized model's distribution and p is float32's.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
import transformers
from report import heading, save
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, TorchAoConfig

from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration, LstmMoeConfig, LstmMoeForCausalLM
from moe_hf.data.text import read_lines

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
FAMILIES = {
    "LSTM-MoE": (LstmMoeConfig, LstmMoeForCausalLM, {"pad_token_id": 0, "eos_token_id": 2}),
    "GNMT-MoE": (GnmtMoeConfig, GnmtMoeForConditionalGeneration, SPECIAL),
}
SIZES = {  # d, h, n, vocabulary
    "small": (64, 128, 8, 1000),
    "medium": (256, 512, 32, 8000),
    "large": (512, 1024, 32, 32000),
}
VARIANTS = {
    "float32": None,
    "int8": TorchAoConfig(Int8WeightOnlyConfig()),
    "int8, softmax too": TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True),
}
SEARCHES = {"1 row": (1, 1), "1 row, 4 beams": (1, 4), "32 rows": (32, 1)}  # rows, beams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lm", help="folder of a trained language model")
    parser.add_argument("--lm_text", help="its validation text")
    parser.add_argument("--translator", help="folder of a trained translator")
    parser.add_argument("--source", help="its validation sentences")
    parser.add_argument("--target", help="their translations")
    parser.add_argument("--lines", type=int, default=500, help="lines to read of each file (default: 500)")
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    facts = f"k = 4, prompts of 16 tokens, {arguments.new_tokens} new ones, median of {arguments.rounds} rounds"
    lines = heading("Weights of 8 bits", facts)
    lines += divergences(arguments)
    print("\n".join(lines), flush=True)
    for family in FAMILIES:
        for size in arguments.sizes:
            table = times(family, size, arguments)
            print("\n".join(table), flush=True)
            lines += table
            save(lines, arguments.output)


def loaded(auto_class, folder: str) -> dict:
    """Loads the model of a folder in each variant."""
    return {
        name: auto_class.from_pretrained(folder, quantization_config=config).eval()
        for name, config in VARIANTS.items()
    }


def stored(weight: torch.Tensor) -> int:
    """Returns the bytes of a parameter in memory."""
    if not hasattr(weight, "qdata"):
        return weight.nbytes
    return sum(part.nbytes for part in (weight.qdata, weight.scale, weight.zero_point))


def times(family: str, size: str, arguments) -> list[str]:
    config_class, model_class, tokens = FAMILIES[family]
    width, hidden, experts, vocabulary = SIZES[size]
    torch.manual_seed(0)
    model = model_class(
        config_class(
            vocab_size=vocabulary,
            hidden_size=width,
            num_experts=experts,
            num_experts_per_tok=4,
            moe_intermediate_size=hidden,
            **tokens,
        )
    )
    for name, weight in model.named_parameters():
        if ".gate." in name:
            torch.nn.init.normal_(weight)  # gates start at zero, where all tokens choose the same experts
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        models = loaded(AutoModelForCausalLM if family == "LSTM-MoE" else AutoModelForSeq2SeqLM, folder)
    floats = dict(model.named_parameters())
    seconds = {search: generation_seconds(models, search, vocabulary, arguments) for search in SEARCHES}
    lines = [
        f"## {family}, {size}: d = {width}, h = {hidden}, n = {experts}, vocabulary {vocabulary}",
        "",
        "| weights | all, MB | quantized part, of float32 | " + " | ".join(f"{s}, tokens/s" for s in SEARCHES) + " |",
        "|---" * (3 + len(SEARCHES)) + "|",
    ]
    for name, variant in models.items():
        parts = dict(variant.named_parameters())
        total = sum(map(stored, parts.values())) / 1e6
        covered = [part for part in parts if hasattr(parts[part], "qdata")]
        share = "-"
        if covered:
            share = sum(stored(parts[part]) for part in covered) / sum(floats[part].nbytes for part in covered)
            share = f"{100 * share:.1f} %"
        cells = []
        for search, (rows, _) in SEARCHES.items():
            speed = rows * arguments.new_tokens / seconds[search][name]
            cells.append(f"{speed:.0f} ({seconds[search]['float32'] / seconds[search][name]:.2f})")
        lines.append(f"| {name} | {total:.1f} | {share} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def generation_seconds(models: dict, search: str, vocabulary: int, arguments) -> dict[str, float]:
    rows, beams = SEARCHES[search]
    ids = torch.randint(3, vocabulary, (rows, 16), generator=torch.Generator().manual_seed(rows))
    new = arguments.new_tokens
    options = {"max_new_tokens": new, "min_new_tokens": new, "num_beams": beams, "do_sample": False}

    seconds = {name: [] for name in models}
    for _ in range(arguments.rounds + 1):
        for name, model in models.items():
            start = time.process_time()
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def divergences(arguments) -> list[str]:
    rows = []
    if arguments.lm:
        tokenizer = AutoTokenizer.from_pretrained(arguments.lm)
        rows += compare(
            "language model", loaded(AutoModelForCausalLM, arguments.lm), text_batches(tokenizer, arguments)
        )
    if arguments.translator:
        tokenizer = AutoTokenizer.from_pretrained(arguments.translator)
        models = loaded(AutoModelForSeq2SeqLM, arguments.translator)
        rows += compare("translator", models, pair_batches(tokenizer, arguments))
    if not rows:
        return []
    return [
        "## On real text",
        "",
        "| model | tokens | weights | mean KL to float32 | largest | perplexity | same first choice |",
        "|---" * 7 + "|",
        *rows,
        "",
    ]


def text_batches(tokenizer, arguments):
    """Yields windows of 128 tokens: inputs, and the next tokens (T,)."""
    lines = [
        line for line in islice(read_lines(os.path.expandvars(arguments.lm_text)), 2 * arguments.lines) if line.strip()
    ]
    text = f" {tokenizer.eos_token} ".join(lines[: arguments.lines])
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    for window in ids.split(128):
        if len(window) > 1:
            yield {"input_ids": window[None]}, torch.cat([window[1:], torch.tensor([-100])])


def pair_batches(tokenizer, arguments):
    """Yields one pair at a time: inputs, and the target with its end-of-sequence token (T,)."""
    pairs = zip(read_lines(os.path.expandvars(arguments.source)), read_lines(os.path.expandvars(arguments.target)))
    for source, target in islice(pairs, arguments.lines):
        encoded = tokenizer(source, text_target=target, return_tensors="pt")
        yield dict(encoded), encoded["labels"][0]


def logits_of(model, inputs: dict, one_at_a_time: bool) -> torch.Tensor:
    """Returns the logits (T, V), of all tokens at once, or token after token as in generation."""
    if not one_at_a_time:
        return model(**inputs).logits[0]
    is_translator = model.config.is_encoder_decoder
    if is_translator:
        ids = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
        rest = {
            "attention_mask": inputs["attention_mask"],
            "encoder_outputs": model.get_encoder()(inputs["input_ids"]),
        }
    else:
        ids, rest = inputs["input_ids"], {}
    state, logits = None, []
    for column in ids.split(1, dim=1):
        token = {"decoder_input_ids" if is_translator else "input_ids": column}
        outputs = model(**token, **rest, past_key_values=state, use_cache=True)
        state = outputs.past_key_values
        logits.append(outputs.logits[0])
    return torch.cat(logits)


@torch.no_grad()
def compare(what: str, models: dict, batches) -> list[str]:
    runs = {name: (model, False) for name, model in models.items()}
    runs |= {f"{name}, token by token": (models[name], True) for name in list(models)[1:]}
    names = list(runs)
    kl_sum, kl_max, nll, same = ({name: 0.0 for name in names} for _ in range(4))
    count = 0
    for inputs, targets in batches:
        scored = targets != -100
        logs = {
            name: logits_of(model, inputs, one_at_a_time)[scored].double().log_softmax(-1)
            for name, (model, one_at_a_time) in runs.items()
        }
        reference, targets = logs["float32"], targets[scored]
        count += len(targets)
        for name, log in logs.items():
            kl = (reference.exp() * (reference - log)).sum(-1)
            kl_sum[name] += kl.sum().item()
            kl_max[name] = max(kl_max[name], kl.max().item())
            nll[name] -= log.gather(1, targets[:, None]).sum().item()
            same[name] += (log.argmax(-1) == reference.argmax(-1)).sum().item()
    rows = []
    for name in names:
        kl = ["-", "-"] if name == "float32" else [f"{kl_sum[name] / count:.1e}", f"{kl_max[name]:.1e}"]
        cells = [f"{math.exp(nll[name] / count):.3f}", f"{100 * same[name] / count:.1f} %"]
        rows.append("| " + " | ".join([what, str(count), name, *kl, *cells]) + " |")
    return rows


if __name__ == "__main__":
    main()
