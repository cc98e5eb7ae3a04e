"""Estimate a model whose experts are spread over devices: memory, communication, time, and the bottleneck.

    moe-hf plan CONFIG.yaml --devices 128 --bandwidth 5 --flops 4 --memory 12
    moe-hf plan --num_experts 131072 --num_expert_groups 256 --hidden_size 512 --devices 1024
    moe-hf plan --paper_table

The model is never allocated, whatever its size. Units are decimal: 1 GB is 10^9 bytes. docs/scale.md explains the
columns.
"""

from pathlib import Path

from ..distributed.plan import EXPERT_GRADIENTS, OPTIMIZERS, Cluster, num_moe_layers, plan_sharding
from ..distributed.plan_report import GB, describe
from ..experiments.paper_tables import BILLION_WORDS_100
from ..training.plan_file import read_config, read_optimizer
from . import command_parser, run_command
from .parser import amount, count, path
from .table import find_configs

MODEL_ARGUMENTS = (
    "vocab_size",
    "hidden_size",
    "lstm_hidden_size",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "num_expert_groups",
    "num_groups_per_tok",
)

# The other models have 32. The numbers are recalled from appendix D and not checked against its text.
PAPER_DEVICES = {"MoE-65536-h": 64, "MoE-131072-h": 128}
PAPER_BATCH = 2_500_000


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("plan", __doc__)
    parser.add_argument(
        "config",
        type=path,
        nargs="?",
        help="YAML file of moe-hf train-lm or train-translation (default: LstmMoeConfig's defaults)",
    )
    parser.add_argument("--devices", type=count, default=8, help="default: 8")
    parser.add_argument("--flops", type=amount, default=100.0, help="TFLOP/s that a device achieves (default: 100)")
    parser.add_argument("--bandwidth", type=amount, default=25.0, help="GB/s that a device can send (default: 25)")
    parser.add_argument("--memory", type=amount, help="GB of memory of a device; warns if the model needs more")
    parser.add_argument(
        "--tokens", type=count, default=16384, help="tokens of each device in one step (default: 16384)"
    )
    parser.add_argument(
        "--optimizer", help=f"{' or '.join(OPTIMIZERS)} (default: the file's optim; without a file factored_adam)"
    )
    parser.add_argument(
        "--expert_gradients", help=f"{' or '.join(EXPERT_GRADIENTS)} (default: the file's; without a file dense)"
    )
    parser.add_argument("--value_bytes", type=count, default=4, help="bytes of a number (default: 4, float32)")
    parser.add_argument("--paper_table", action="store_true", help="print the memory of the paper's models instead")
    for name in MODEL_ARGUMENTS:
        parser.add_argument(f"--{name}", type=count, help="override the file's value")
    return run_command(lambda: print(report(parser.parse_args(argv))))


def report(arguments) -> str:
    if arguments.paper_table:
        return paper_memory_table(find_configs(None) / "lm")
    changes = {name: getattr(arguments, name) for name in MODEL_ARGUMENTS if getattr(arguments, name) is not None}
    memory = None if arguments.memory is None else arguments.memory * 1e9
    cluster = Cluster(arguments.devices, arguments.flops * 1e12, arguments.bandwidth * 1e9, memory)
    config = read_config(arguments.config, changes)
    optimizer, expert_gradients = read_optimizer(arguments.config, arguments.optimizer, arguments.expert_gradients)
    options = optimizer, arguments.value_bytes, expert_gradients
    return describe(plan_sharding(config, cluster, arguments.tokens, *options))


def paper_memory_table(folder: Path) -> str:
    """Return a Markdown table of the memory of the paper's models for 100 billion words, in GB per device.

    Each model is on as many devices as in the paper.

    Args:
        folder: the folder configs/lm.
    """
    names = ("model", "devices", "experts of a device", "tokens per expert", "parameters", "gradients")
    names += ("factored state", "Adam's state", "gathered, kept", "peak, factored", "peak, Adam")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in BILLION_WORDS_100:
        config = read_config(folder / row.config)
        cluster = Cluster(PAPER_DEVICES.get(row.name, 32), flops=1, bandwidth=1)
        adam, factored = (plan_sharding(config, cluster, PAPER_BATCH // cluster.devices, name) for name in OPTIMIZERS)
        cells = [row.name, str(cluster.devices), "-", "-"]
        if num_moe_layers(config):
            cells[2:] = f"{factored.experts_per_device:,}", f"{factored.tokens_per_expert:,.0f}"
        values = [sum(parts) for parts in zip(factored.experts, factored.dense, factored.embeddings)]
        values.append(adam.experts.optimizer + adam.dense.optimizer + adam.embeddings.optimizer)
        values += [factored.gathered + factored.activations, factored.memory, adam.memory]
        lines.append("| " + " | ".join([*cells, *(f"{value / GB:.2f}" for value in values)]) + " |")
    return "\n".join(lines)
