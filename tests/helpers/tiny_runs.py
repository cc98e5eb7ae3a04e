"""The arguments of training runs of four steps, for a language model and a translation model, and text for a run."""

import json

import yaml

from moe_hf.demo.text_corpus import write_demo_corpus

CONFIG = """
tokenizer_kind: word
vocab_size: 50
hidden_size: 8
num_experts: 4
num_experts_per_tok: 2
moe_intermediate_size: 8
window_length: 7
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
max_steps: 4
logging_steps: 2
save_strategy: "no"
report_to: none
use_cpu: true
disable_tqdm: true
"""

# Arguments without data.
TRANSLATION_CONFIG = """
vocab_size: 290
tokens_per_batch: 40
hidden_size: 8
encoder_layer_pattern: [lstm, moe]
decoder_layer_pattern: [lstm, moe]
num_experts: 4
num_experts_per_tok: 2
moe_intermediate_size: 8
dropout: 0.1
label_smoothing: 0.1
max_steps: 4
logging_steps: 2
learning_rate: 0.01
warmup_steps: 2
constant_steps: 1
save_strategy: "no"
report_to: none
use_cpu: true
disable_tqdm: true
"""


def write_config(folder) -> None:
    """Writes train.txt, valid.txt, and `config.yaml`, the configuration of a run into `run`."""
    write_demo_corpus(folder, num_train_lines=40, num_valid_lines=8)
    paths = {"train_files": [f"{folder}/train.txt"], "validation_files": [f"{folder}/valid.txt"]}
    paths |= {"cache_dir": f"{folder}/cache", "output_dir": f"{folder}/run"}
    (folder / "config.yaml").write_text(CONFIG + json.dumps(paths)[1:-1].replace(', "', '\n"'), encoding="utf-8")


def write_translation_config(folder, texts: dict[str, list[str]], **own):
    """Writes a text for each language and the file `config.yaml` of a run into `run`; returns the file's path."""
    for language, lines in texts.items():
        (folder / f"text.{language}").write_text("\n".join(lines * 8) + "\n", encoding="utf-8")
    pairs = [{"parallel_files": {language: str(folder / f"text.{language}") for language in texts}}]
    own = {"train_pairs": pairs, "validation_pairs": pairs} | own
    own |= {"cache_dir": str(folder / "cache"), "output_dir": str(folder / "run")}
    (folder / "config.yaml").write_text(TRANSLATION_CONFIG + yaml.safe_dump(own, sort_keys=False), encoding="utf-8")
    return folder / "config.yaml"
