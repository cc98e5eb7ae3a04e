#!/usr/bin/env python3
"""Time of a training step on documents: packed into one row, padded to a batch, and joined to one long text.

    python benchmarks/packing.py [--file valid.txt.gz] [--tokens 4096] [--output FILE.md]

The documents are the lines of a text that have at least 8 words. A packed row starts each document from a zero state.
The same row without its boundaries is one text, which the LSTM reads position by position. Each step is the forward
and backward pass of a whole language model. The variants are timed in turn.
"""

import argparse
import gzip
import lzma
from pathlib import Path

import torch
from report import heading, median_seconds, save
from transformers import DataCollatorWithFlattening

from moe_hf import LstmMoeConfig, LstmMoeForCausalLM
from moe_hf.data.paths import expand_path

OPEN = {".gz": gzip.open, ".xz": lzma.open}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="${MOE_HF_DATA}/wikitext-2/valid.txt.gz", help="text, plain, .gz or .xz")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="approximate tokens of a step")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_experts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = LstmMoeConfig(
        vocab_size=4096,
        hidden_size=arguments.hidden_size,
        moe_intermediate_size=2 * arguments.hidden_size,
        num_experts=arguments.num_experts,
        loss_chunk_size=256,
    )
    model = LstmMoeForCausalLM(config).train()
    facts = f"d = {config.hidden_size}, {config.num_experts} experts, {model.num_parameters() / 1e6:.0f} M parameters"
    lines = [
        *heading("Packing: a training step on documents", facts),
        f"Times over that of the padded batch, medians of {arguments.rounds} rounds; default allocator.",
        "",
        "| tokens | documents | longest | padded positions | padded, seconds | packed | one text |",
        "|---|---|---|---|---|---|---|",
    ]
    for tokens in arguments.tokens:
        documents = read_documents(Path(expand_path(arguments.file, "file")), tokens, config.vocab_size)
        longest, total = max(map(len, documents)), sum(map(len, documents))
        times = median_seconds(steps_of(model, documents), arguments.rounds)
        padded = times["padded"]
        row = [f"{total:,}", f"{len(documents)}", f"{longest}", f"{len(documents) * longest:,}", f"{padded:.3f}"]
        row += [f"{times[name] / padded:.2f}" for name in ("packed", "one text")]
        lines.append(f"| {' | '.join(row)} |")
    print("\n".join(lines))
    save(lines, arguments.output)


def read_documents(file: Path, tokens: int, vocab_size: int) -> list[list[int]]:
    """Reads lines of at least 8 words until they have `tokens` words; a word's id is its hash."""
    documents = []
    with OPEN.get(file.suffix, open)(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            words = line.split()
            if len(words) >= 8:
                documents.append([1 + sum(word.encode()) * 7919 % (vocab_size - 1) for word in words])
            if sum(map(len, documents)) >= tokens:
                break
    return documents


def steps_of(model, documents: list[list[int]]) -> dict:
    packed = DataCollatorWithFlattening(return_seq_idx=True)([{"input_ids": document} for document in documents])
    one_text = {name: packed[name] for name in ("input_ids", "labels")}
    longest = max(map(len, documents))
    ids = torch.tensor([document + [0] * (longest - len(document)) for document in documents])
    padded = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids}

    def step(batch):
        model.zero_grad()
        model(**batch).loss.backward()

    return {
        name: lambda batch=batch: step(batch)
        for name, batch in (("padded", padded), ("packed", packed), ("one text", one_text))
    }


if __name__ == "__main__":
    main()
