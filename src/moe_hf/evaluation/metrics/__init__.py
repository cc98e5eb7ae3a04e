"""This package's `evaluate` metrics, each in a folder that `evaluate.load` loads by its path."""

from pathlib import Path

from ...extra_packages import require_packages

# The packages of the extra `eval` that each metric needs.
METRICS = {"sacrebleu_metrics": ("evaluate", "sacrebleu"), "stream_perplexity": ("evaluate",)}


def load_metric(name: str):
    """Load one of `METRICS`, without network access.

    Raises:
        InputError: a package that the metric needs is missing.
    """
    require_packages(*METRICS[name])
    import evaluate

    return evaluate.load(str(Path(__file__).parent / name / f"{name}.py"))
