"""Print how a model's experts spread over devices: memory, bytes moved, time, and what bounds it (docs/sharding.md).

    moe-hf plan CONFIG.yaml --devices 128 --bandwidth 5 --flops 4 --memory 12
    moe-hf plan --num_experts 131072 --num_expert_groups 256 --hidden_size 512 --devices 1024
    moe-hf plan --paper_table

Nothing is allocated, whatever the size. Numbers are decimal: a GB is 10^9 bytes.
"""

from pathlib import Path

from ..distributed.plan import OPTIMIZERS, Cluster, plan_sharding
from ..distributed.plan_report import describe, paper_memory_table, read_config
from . import command_parser, run_command
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


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("plan", __doc__)
    parser.add_argument(
        "config", type=Path, nargs="?", help="file of a training script; by default LstmMoeConfig's values"
    )
    parser.add_argument("--devices", type=int, default=8, help="default: 8")
    parser.add_argument("--flops", type=float, default=100.0, help="TFLOP/s that a device reaches (default: 100)")
    parser.add_argument("--bandwidth", type=float, default=25.0, help="GB/s that a device sends (default: 25)")
    parser.add_argument("--memory", type=float, help="GB of a device, to be warned if it is too little")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of each device in a step (default: 16384)")
    parser.add_argument("--optimizer", default="factored_adam", help=" or ".join(OPTIMIZERS))
    parser.add_argument("--value_bytes", type=int, default=4, help="bytes of a value (default: 4, float32)")
    parser.add_argument("--paper_table", action="store_true", help="the table of docs/sharding.md instead")
    for name in MODEL_ARGUMENTS:
        parser.add_argument(f"--{name}", type=int, help="of the model, instead of the file's")
    arguments = parser.parse_args(argv)
    return run_command(lambda: print(report(arguments)))


def report(arguments) -> str:
    if arguments.paper_table:
        return paper_memory_table(find_configs(None) / "lm")
    changes = {name: getattr(arguments, name) for name in MODEL_ARGUMENTS if getattr(arguments, name) is not None}
    memory = None if arguments.memory is None else arguments.memory * 1e9
    cluster = Cluster(arguments.devices, arguments.flops * 1e12, arguments.bandwidth * 1e9, memory)
    config = read_config(arguments.config, changes)
    return describe(plan_sharding(config, cluster, arguments.tokens, arguments.optimizer, arguments.value_bytes))
