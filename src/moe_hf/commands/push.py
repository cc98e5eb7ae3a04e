"""Upload a trained model to the Hub: weights, tokenizer, code and a model card. The model loads without this package.

    moe-hf push MODEL REPO [--private]
    moe-hf push MODEL REPO --dry-run FOLDER     # writes FOLDER, uploads nothing

Log in first, with `hf auth login` or the environment variable HF_TOKEN.
"""

from ..hub import STORED_DTYPES, export, push
from ..hub_errors import check_repo_id
from . import command_parser, run_command
from .parser import size


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("push", __doc__)
    parser.add_argument("model", help="output folder of a training, or folder or Hub name of a model")
    parser.add_argument("repo", help="name of the Hub repository, such as me/my-moe")
    parser.add_argument("--private", action="store_true", help="create a new repository as private")
    parser.add_argument("--dry-run", metavar="FOLDER", help="write the repository into this folder and upload nothing")
    parser.add_argument("--license", default="apache-2.0", help="licence of the weights (default: apache-2.0)")
    parser.add_argument(
        "--language",
        nargs="+",
        help="codes of the model's languages, such as en (default: the languages of the sentence pairs)",
    )
    parser.add_argument(
        "--max_shard_size", type=size, default="5GB", help="maximal size of a weights file (default: 5GB)"
    )

    parser.add_argument(
        "--stored_dtype",
        choices=STORED_DTYPES,
        help="dtype of the weights in the file; the model still loads in its own dtype (default: the model's)",
    )
    parser.add_argument(
        "--data", help="text for the card about the training data: origin, licence, attribution (default: none)"
    )

    def run() -> dict:
        arguments = parser.parse_args(argv)
        names = ("license", "language", "max_shard_size", "stored_dtype", "data")
        options = {name: getattr(arguments, name) for name in names}
        if arguments.dry_run is not None:
            check_repo_id(arguments.repo)
            export(arguments.model, arguments.dry_run, repo_id=arguments.repo, argument="dry-run", **options)
            return {"written to": arguments.dry_run}
        return {"uploaded": push(arguments.model, arguments.repo, private=arguments.private, **options)}

    return run_command(run)
