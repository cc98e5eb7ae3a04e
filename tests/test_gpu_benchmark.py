"""benchmarks/gpu.py on a CPU: it resumes, reports failures, and measures the layers that it names."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

MODULES = ("report", "gpu_place", "gpu_correctness", "gpu_layers", "gpu_models", "gpu")


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    yield importlib.import_module("gpu")
    sys.path.pop(0)
    for name in MODULES:
        del sys.modules[name]


def run(gpu, folder, *options):
    return gpu.main(["--device", "cpu", "--tiny", "--output", str(folder / "gpu.md"), *options])


def sections_of(folder):
    return json.loads((folder / "gpu.json").read_text())["sections"]


def test_real_sections_pass_and_are_written(gpu, tmp_path):
    names = ["machine", "correctness of experts", "experts", "gates"]
    assert run(gpu, tmp_path, "--sections", *names) == 0
    sections, text = sections_of(tmp_path), (tmp_path / "gpu.md").read_text()
    assert list(sections) == names and all(section["complete"] for section in sections.values())
    compared = {case["case"].split(",")[0] for case in sections["correctness of experts"]["cases"]}
    assert {"moe_hf", "grouped_mm", "batched_mm", "eager"} <= compared
    assert all(0 < case["relative error"] < case["limit"] for case in sections["correctness of experts"]["cases"])
    assert "## Gates" in text and "Tiny sizes" in text


def test_goes_on_with_the_sections_that_are_missing(gpu, tmp_path, monkeypatch):
    calls = []

    def section(name):
        def cases(place):
            yield gpu.Case(name, lambda: calls.append(name) or {"ms": 1.5})

        return cases

    monkeypatch.setattr(gpu, "SECTIONS", {name: section(name) for name in "abc"})
    run(gpu, tmp_path, "--sections", "a")
    run(gpu, tmp_path, "--minutes", "0")
    assert calls == ["a"] and list(sections_of(tmp_path)) == ["a"]
    run(gpu, tmp_path)
    assert calls == ["a", "b", "c"]
    run(gpu, tmp_path, "--again", "--sections", "b")
    assert calls == ["a", "b", "c", "b"]


def test_a_section_that_the_time_cuts_off_is_run_again(gpu, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def cases(place):
        for number in range(3):
            yield gpu.Case(str(number), lambda: now.__setitem__(0, now[0] + 60) or {})

    monkeypatch.setattr(gpu, "SECTIONS", {"a": cases})
    run(gpu, tmp_path, "--minutes", "1.5")
    assert not sections_of(tmp_path)["a"]["complete"] and len(sections_of(tmp_path)["a"]["cases"]) == 2
    run(gpu, tmp_path, "--minutes", "5")
    assert sections_of(tmp_path)["a"]["complete"] and len(sections_of(tmp_path)["a"]["cases"]) == 3


@pytest.mark.parametrize("failure", ["error", "above the limit"])
def test_a_case_that_fails_is_told_and_the_next_one_runs(gpu, tmp_path, monkeypatch, capsys, failure):
    def fail():
        if failure == "error":
            raise RuntimeError("no such\nkernel")
        return gpu.gpu_correctness.compared(0.2, 0.1)

    cases = [gpu.Case("bad", fail), gpu.Case("good", lambda: gpu.gpu_correctness.compared(0.05, 0.1))]
    monkeypatch.setattr(gpu, "SECTIONS", {"a": lambda place: cases})
    assert run(gpu, tmp_path) == 1
    output = capsys.readouterr().out
    assert "FAILED bad" in output and "FAILED good" not in output
    bad, good = sections_of(tmp_path)["a"]["cases"]
    assert bad.get("failed") == ("RuntimeError: no such kernel" if failure == "error" else None) and good["ok"]


def timed(rows, experts, **milliseconds):
    sizes = {"rows": rows, "rows an expert": rows / experts, "type": "bfloat16"}
    return [{"case": f"{by}: {rows}", "by": by, "ms": ms} | sizes for by, ms in milliseconds.items()]


def test_the_limits_between_implementations_are_read_from_the_times(gpu):
    few = timed(4, 8, batched_mm=1, triton=2, grouped_mm=3) + timed(32, 8, batched_mm=2, triton=3, grouped_mm=4)
    few += timed(256, 8, batched_mm=9, triton=3, grouped_mm=4) + [{"case": "batched_mm: 512", "failed": "memory"}]
    many = timed(128, 8, triton=1, grouped_mm=2) + timed(512, 8, triton=3, grouped_mm=2)
    many += timed(1024, 8, triton=5, grouped_mm=4)
    sections = {"experts, few tokens": {"cases": few}, "experts": {"cases": many}}
    assert gpu.gpu_layers.limits(sections) == {"batched_mm_rows": 32, "grouped_mm_rows": 64.0}
    without = {"experts": {"cases": [case for case in many if case["by"] != "triton"]}}
    assert gpu.gpu_layers.limits(without) == {"batched_mm_rows": 0, "grouped_mm_rows": None}


def test_wrong_experts_are_found(gpu, monkeypatch):
    place = gpu.Place(torch.device("cpu"), True)
    forward = gpu.gpu_correctness.ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(
        gpu.gpu_correctness.ALL_EXPERTS_FUNCTIONS._local_mapping, "grouped_mm", lambda *args: 1.01 * forward(*args)
    )
    assert not gpu.gpu_correctness.experts_error(place, "grouped_mm", 12, torch.float32)["ok"]


def test_says_that_there_is_no_gpu(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--output", str(tmp_path / "gpu.md")])
    assert "--device cuda: torch sees no such device" in capsys.readouterr().err
