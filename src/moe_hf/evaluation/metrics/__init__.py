"""Our `evaluate` metrics, each a folder that `evaluate.load` takes by its path."""

from pathlib import Path


def load_metric(name: str):
    """Load one of the metrics of this folder; needs no network.

    Raises:
        ImportError: the package `evaluate` is missing (`pip install moe_hf[eval]`).
    """
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("evaluation needs the package 'evaluate': pip install 'moe_hf[eval]'") from error
    return evaluate.load(str(Path(__file__).parent / name / f"{name}.py"))
