"""Make a model with many experts from a trained model with one or a few. At the start, both compute the same function.

    moe-hf upcycle MODEL OUT --num_experts 32 --slices 4                        # MODEL has one expert (MoE-1-Wide)
    moe-hf upcycle MODEL OUT --num_experts 256 --slices 2 --num_expert_groups 32    # MODEL has 32 experts, flat

The output folder also gets the tokenizer and the generation settings, but not the optimizer state. To continue the
training, run `moe-hf train-lm` with --model_name_or_path OUT. docs/upcycle.md says when both models are exactly
equal, and when they are only approximately equal.
"""

from ..hub import save_tokenizer
from ..loading import load_model_and_tokenizer
from ..model_code import add_code
from ..model_size import ops_per_timestep
from ..models.configuration_moe import GATINGS
from ..upcycling import exactness, upcycle
from ..writing import check_new_folder, new_folder
from . import command_parser, run_command
from .parser import count, weight, whole


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("upcycle", __doc__)
    parser.add_argument("model", help="folder or Hub name of the model and its tokenizer")
    parser.add_argument("out", help="new folder for the result")
    parser.add_argument("--num_experts", type=count, required=True, help="experts in each MoE layer of the result")
    parser.add_argument("--slices", type=count, default=1, help="slices that each expert is cut into (default: 1)")
    parser.add_argument(
        "--num_experts_per_tok", type=count, help="experts per token (default: same cost as before, at least 2)"
    )
    parser.add_argument(
        "--num_expert_groups", type=count, help="groups of a hierarchical gate; n for a model with n experts"
    )
    parser.add_argument(
        "--num_groups_per_tok", type=count, help="groups per token, for a model with one expert (default: 2)"
    )
    parser.add_argument("--gating", choices=GATINGS, help="gate, for a model with one expert (default: the model's)")
    parser.add_argument(
        "--gate_std",
        type=weight,
        default=1.0,
        help="standard deviation of the replicas' random gate logits (default: 1)",
    )
    parser.add_argument(
        "--expert_std",
        type=weight,
        default=0.0,
        help="noise on the experts' weights, relative to their standard deviation (default: 0)",
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="default: 0")
    return run_command(lambda: upcycle_folder(**vars(parser.parse_args(argv))))


def upcycle_folder(model: str, out: str, num_experts: int, **options) -> dict[str, str]:
    """Call `upcycle` from folder to folder, and return what to print."""
    check_new_folder(out, "out")
    source, tokenizer = load_model_and_tokenizer(model)
    result = upcycle(source, num_experts, **options)
    with new_folder(out, "out") as folder:
        result.save_pretrained(folder)
        add_code(folder)
        save_tokenizer(tokenizer, folder)
    pair = (source, result)
    same = exactness(source.config, result.config, options["gate_std"], options["expert_std"])
    return {
        "parameters": " -> ".join(f"{of.num_parameters() / 1e6:.2f} M" for of in pair),
        "operations per token": " -> ".join(f"{ops_per_timestep(of.config) / 1e6:.2f} M" for of in pair),
        "the source's function": same,
        "written to": out,
    }
