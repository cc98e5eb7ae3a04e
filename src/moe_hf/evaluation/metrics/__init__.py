"""Our `evaluate` metrics, each a folder that `evaluate.load` takes by its path."""

from pathlib import Path

from ...errors import InputError


def load_metric(name: str):
    """Load one of the metrics of this folder; needs no network.

    Raises:
        InputError: the package `evaluate`, or one that the metric needs, is missing (`pip install 'moe_hf[eval]'`).
    """
    try:
        import evaluate
    except ImportError as error:
        reason = "evaluation needs the package 'evaluate', which is missing: pip install 'moe_hf[eval]'"
        raise InputError(reason) from error
    try:
        return evaluate.load(str(Path(__file__).parent / name / f"{name}.py"))
    except ImportError as error:
        reason = f"the metric {name!r} needs a package that is missing: pip install 'moe_hf[eval]' ({error})"
        raise InputError(reason) from error
