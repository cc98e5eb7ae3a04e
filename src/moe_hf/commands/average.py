"""Average the weights of the last checkpoints of a training run into one model.

    moe-hf average runs/en-de runs/en-de-averaged --last 10

The training must have kept that many checkpoints (--save_total_limit). With --load_best_model_at_end, the kept
checkpoints include the best one, which may be older than the others. The command prints the checkpoints' names.

The output folder also gets the tokenizer, the generation settings and the training's records for a model card. It does
not get the optimizer state or the training's results. Compare the average with the last checkpoint on validation data,
with `moe-hf evaluate`.
"""

from ..averaging import average_checkpoints, keep_training, last_checkpoints
from ..data.tokenizers import load_tokenizer
from ..hub import save_tokenizer
from ..loading import check_pair, load_config
from ..model_code import add_code
from ..writing import check_new_folder, new_folder
from . import command_parser, run_command
from .parser import count


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("average", __doc__)
    parser.add_argument("run", help="output folder of a training, with checkpoint-N folders")
    parser.add_argument("out", help="new folder for the result")
    parser.add_argument("--last", type=count, default=10, help="number of checkpoints (default: 10)")
    return run_command(lambda: average(**vars(parser.parse_args(argv))))


def average(run: str, out: str, last: int) -> dict:
    """Call `average_checkpoints` from folder to folder, and return what to print."""
    check_new_folder(out, "out")
    folders = last_checkpoints(run, last)
    load_config(str(folders[-1]), argument="checkpoint")
    tokenizer = load_tokenizer(str(folders[-1]), argument="checkpoint")
    model = average_checkpoints(folders)
    check_pair(tokenizer, model.config, f"checkpoint={folders[-1]}")
    with new_folder(out, "out") as output:
        model.save_pretrained(output)
        add_code(output)
        save_tokenizer(tokenizer, output)
        keep_training(run, folders, output)
    return {"averaged": ", ".join(folder.name for folder in folders), "written to": out}
