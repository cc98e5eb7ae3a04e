"""Our `evaluate` metrics, each a folder that `evaluate.load` takes by its path."""

from pathlib import Path

from ...extra_packages import require_packages

# The packages of the extra `eval` that each metric needs.
METRICS = {"sacrebleu_metrics": ("evaluate", "sacrebleu"), "stream_perplexity": ("evaluate",)}


def load_metric(name: str):
    """Load one of `METRICS`; needs no network.

    Raises:
        InputError: a package that it needs is missing.
    """
    require_packages(*METRICS[name])
    import evaluate

    return evaluate.load(str(Path(__file__).parent / name / f"{name}.py"))
