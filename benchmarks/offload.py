#!/usr/bin/env python3
"""Time and memory of generation when the weights do not fit: accelerate's offload to disk against all in memory.

    python benchmarks/offload.py [--output benchmarks/results/offload.md]

A checkpoint is written to a temporary folder, and each variant runs in a separate process. The checkpoint's pages are
first dropped from the system's file cache, so that every read comes from the disk. "auto" is device_map="auto" with
max_memory below the model's size; "experts" puts the experts alone on the disk. Memory is the process's resident
memory above its resident memory before loading. It consists of the process's own pages and of mapped pages of files,
which the system can reclaim. The checkpoint is float32: bfloat16 weights have to be converted, and cannot be used in
place in the file. The variants in one dtype must give the same tokens.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import transformers
from report import heading, save

from moe_hf import GnmtMoeConfig, GnmtMoeForConditionalGeneration, LstmMoeConfig, LstmMoeForCausalLM
from moe_hf.offload import experts_device_map

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
FAMILIES = {
    "LSTM-MoE": (LstmMoeConfig, LstmMoeForCausalLM, {"pad_token_id": 0, "eos_token_id": 2}),
    "GNMT-MoE": (GnmtMoeConfig, GnmtMoeForConditionalGeneration, SPECIAL),
}
VARIANTS = ("memory", "auto", "experts", "memory, bfloat16", "experts, bfloat16")
SEARCHES = {"1 row, greedy": (1, 1), "1 row, 4 beams": (1, 4), "32 rows, greedy": (32, 1)}  # rows, beams
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--moe_intermediate_size", type=int, default=512)
    parser.add_argument("--num_experts", type=int, default=256)
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--budget", type=float, default=0.5, help="max_memory of auto over model size (default: 0.5)")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to")
    parser.add_argument("--run", nargs=3, metavar=("FAMILY", "VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(measure(*arguments.run, arguments)))
        return
    facts = (
        f"d = {arguments.hidden_size}, h = {arguments.moe_intermediate_size}, n = {arguments.num_experts}, k = 4, "
        f"prompts of 16 tokens, {arguments.new_tokens} new ones"
    )
    lines = heading("Generation with weights on the disk", facts)
    for family in FAMILIES:
        lines += table(family, arguments)
    print("\n".join(lines))
    save(lines, arguments.output)


def table(family: str, arguments) -> list[str]:
    config_class, model_class, tokens = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(
        config_class(
            vocab_size=arguments.vocab_size,
            hidden_size=arguments.hidden_size,
            num_experts=arguments.num_experts,
            moe_intermediate_size=arguments.moe_intermediate_size,
            **tokens,
        )
    )
    for name, weight in model.named_parameters():
        if ".gate." in name:
            torch.nn.init.normal_(weight)  # gates start at zero, where all tokens choose the same experts
    size = sum(param.nbytes for param in model.parameters())
    of_experts = sum(param.nbytes for name, param in model.named_parameters() if ".experts." in name)
    lines = [
        f"## {family}: {size / MB:.0f} MB, {of_experts / MB:.0f} MB of them experts",
        "",
        "| weights | search | ms per token | read from disk per token, MB | most resident: own, MB | of files, MB |",
        "|---" * 6 + "|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        results = {variant: run(family, variant, folder) for variant in VARIANTS}
    for variant, result in results.items():
        loaded = "memory" + variant.removeprefix("auto").removeprefix("experts").removeprefix("memory")
        if result["tokens"] != results[loaded]["tokens"]:
            raise RuntimeError(f"{family}: {variant} generates other tokens than {loaded}")
        lines.append(
            f"| {result['where']} | load | {1e3 * result['load']:.0f} ms in all | - | {result['own'] / MB:.0f} | "
            f"{result['files'] / MB:.0f} |"
        )
        for search, numbers in result["searches"].items():
            cells = [f"{numbers[name] / MB:.1f}" for name in ("read", "own", "files")]
            lines.append(f"| | {search} | {numbers['ms']:.1f} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def run(family: str, variant: str, folder: str) -> dict:
    """Returns the result of `measure`, run in a separate process."""
    for file in Path(folder).glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, *sys.argv[1:], "--run", family, variant, folder]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(family: str, variant: str, folder: str, arguments) -> dict:
    """Loads a model and generates; returns bytes and milliseconds."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model_class = FAMILIES[family][1]
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    config = FAMILIES[family][0].from_pretrained(folder)
    placed, _, dtype = variant.partition(", ")
    options, where = {
        "memory": ({}, "in memory"),
        "auto": ({"device_map": "auto", "max_memory": {"cpu": int(arguments.budget * size)}}, "auto"),
        "experts": ({"device_map": experts_device_map(config)}, "experts on disk"),
    }[placed]
    options["dtype"] = dtype or "float32"
    with Peak() as peak:
        start = time.perf_counter()
        model = model_class.from_pretrained(folder, **options).eval()
        load = time.perf_counter() - start
    if variant == "auto":
        on_disk = sum(param.nbytes for param in model.parameters() if param.is_meta)
        where = f"auto with {arguments.budget * size / MB:.0f} MB: {on_disk / MB:.0f} MB on disk"
    searches, tokens = {}, []
    for search, (rows, beams) in SEARCHES.items():
        numbers, found = generate(model, rows, beams, arguments, peak.before)
        searches[search] = numbers
        tokens.append(found)
    return {
        "where": f"{where}, {dtype}" if dtype else where,
        "load": load,
        **peak.above,
        "searches": searches,
        "tokens": tokens,
    }


def generate(model, rows: int, beams: int, arguments, before: dict) -> tuple[dict, list]:
    """Returns the numbers of a search, its memory above `before`, and its tokens."""
    ids = torch.randint(3, arguments.vocab_size, (rows, 16), generator=torch.Generator().manual_seed(rows))
    new = arguments.new_tokens
    options = {"max_new_tokens": new, "min_new_tokens": new, "num_beams": beams, "do_sample": False}
    with Peak(before) as peak:
        start, read = time.perf_counter(), numbers_of("io", "read_bytes")[0]
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        seconds, read = time.perf_counter() - start, numbers_of("io", "read_bytes")[0] - read
    return {"ms": 1e3 * seconds / new, "read": read / new, **peak.above}, found.tolist()


class Peak:
    """A context that samples how far memory rises above `before`, or above memory at the start."""

    def __init__(self, before: dict[str, int] | None = None):
        self.before = before or self.now()
        self.above = dict.fromkeys(self.before, 0)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    @staticmethod
    def now() -> dict[str, int]:
        own, of_files = numbers_of("status", "RssAnon", "RssFile")
        return {"own": 1024 * own, "files": 1024 * of_files}

    def watch(self) -> None:
        while not self.done.wait(0.002):
            now = self.now()
            self.above = {name: max(self.above[name], now[name] - self.before[name]) for name in now}

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def numbers_of(file: str, *names: str) -> list[int]:
    """Reads numbers of /proc/self; read_bytes counts all bytes fetched from storage, including page faults."""
    text = Path(f"/proc/self/{file}").read_text()
    return [int(re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[1]) for name in names]


if __name__ == "__main__":
    main()
