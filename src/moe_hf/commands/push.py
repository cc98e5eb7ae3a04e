"""Put a trained model on the Hub: weights, tokenizer, code and a model card, usable without this package.

    moe-hf push MODEL REPO [--private]
    moe-hf push MODEL REPO --dry-run FOLDER     # writes FOLDER, uploads nothing

Log in first, by `hf auth login` or the environment variable HF_TOKEN.
"""

from ..hub import export, push
from ..hub_errors import check_repo_id
from . import command_parser, run_command
from .parser import size


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("push", __doc__)
    parser.add_argument("model", help="folder of a training (its output_dir), or folder or Hub name of a model")
    parser.add_argument("repo", help="name of the repository on the Hub, such as me/my-moe")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", metavar="FOLDER", help="write the repository into this folder and upload nothing")
    parser.add_argument("--license", default="apache-2.0", help="of the weights (default: apache-2.0)")
    parser.add_argument(
        "--language", nargs="+", help="codes of its languages, such as en (default: the sentence pairs')"
    )
    parser.add_argument(
        "--max_shard_size", type=size, default="5GB", help="size of a weights file at most (default: 5GB)"
    )

    def run() -> dict:
        arguments = parser.parse_args(argv)
        options = {name: getattr(arguments, name) for name in ("license", "language", "max_shard_size")}
        if arguments.dry_run is not None:
            check_repo_id(arguments.repo)
            export(arguments.model, arguments.dry_run, repo_id=arguments.repo, argument="dry-run", **options)
            return {"written to": arguments.dry_run}
        return {"uploaded": push(arguments.model, arguments.repo, private=arguments.private, **options)}

    return run_command(run)
