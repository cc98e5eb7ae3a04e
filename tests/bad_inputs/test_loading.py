"""Folders of models, tokenizers, runs and checkpoints that are damaged."""

import pytest
from bad_inputs import Case, Place, judge


def _truncated_weights(place: Place):
    weights = place.lm() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    return ["evaluate-lm", place / "lm", place.file("text.txt", "a b c\n" * 50)]


CASES = [
    Case("truncated model.safetensors", _truncated_weights, ("model.safetensors",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage_is_named(case, tmp_path):
    verdict = judge(case, tmp_path)
    assert not verdict.fault, f"{verdict.fault}: {verdict.why}"
