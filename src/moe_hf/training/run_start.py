"""The steps of a run before it reads data: the lock, the checks, the checkpoint to resume from."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import set_seed

from ..distributed.sharding import check_same_run_everywhere
from ..distributed.waiting import broadcast_from_rank_zero
from ..families import Family
from .arguments import MoeTrainingArguments
from .checkpoints import prepare_output_dir
from .run_checks import check_run
from .run_lock import run_lock
from .runs import check_hub_arguments, check_named_folders, quiet_logs, run_identity


@contextmanager
def started_run(
    family: Family, model_args, data_args, training_args: MoeTrainingArguments, metrics: dict[str, bool], is_own: bool
) -> Iterator[str | None]:
    """Check everything that does not need data, then hold the lock of `output_dir` inside the context.

    Args:
        family: the family to train.
        model_args (ModelArguments): the model arguments.
        data_args (object): the data arguments.
        training_args: the training arguments.
        metrics: {metric of an evaluation: whether more is better}.
        is_own: whether the model belongs to this package; the architecture of other models is not checked.

    Yields:
        The checkpoint to resume from, or None.

    Raises:
        InputError: an argument is wrong, the processes' arguments differ, or another run writes into `output_dir`.
    """
    identity = run_identity(model_args, data_args, training_args)
    check_same_run_everywhere(identity, training_args)
    with run_lock(training_args):
        folder, resume = training_args.output_dir, training_args.resume_from_checkpoint
        model_type = family.config_class.model_type if is_own else None
        checkpoint = broadcast_from_rank_zero(
            lambda: prepare_output_dir(folder, resume, identity, model_type), training_args
        )
        check_named_folders(family, model_args, data_args, checkpoint)
        check_hub_arguments(training_args)
        check_run(family.model_class if is_own else None, model_args, data_args, training_args, metrics)
        set_seed(training_args.seed)
        quiet_logs(training_args)
        yield checkpoint
