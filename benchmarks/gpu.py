#!/usr/bin/env python3
"""Measures in one command of at most ten minutes what needs a GPU: correctness, speed and memory.

    python benchmarks/gpu.py --output benchmarks/results/gpu-NAME.md
    python benchmarks/gpu.py --device cpu --tiny        # tries the script itself

The command needs no network. Results are written after each section, as tables to --output and as JSON beside it.
Running the same command again measures the sections that are missing there, for example after --minutes have passed.
The exit status is 1 if a case failed.

With --scattermoe, a copy of github.com/shawntan/scattermoe, its experts are timed too.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import gpu_correctness
import gpu_layers
import gpu_models
import torch
from gpu_place import Case, Place, is_broken, machine, release
from report import heading, save

# The most important sections come first: the time may not suffice for all of them.
SECTIONS = {
    "machine": machine,
    "correctness of models": gpu_correctness.models,
    "correctness of experts": gpu_correctness.experts,
    "behaviour": gpu_correctness.behaviour,
    "host reads": gpu_models.host_reads,
    "experts": gpu_layers.experts,
    "experts, few tokens": gpu_layers.few_tokens,
    "training": gpu_models.training,
    "decoding": gpu_models.decoding,
    "LSTM": gpu_layers.lstm,
    "gates": gpu_layers.gates,
    "memory": gpu_models.memory,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: the numbers mean nothing")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--again", action="store_true", help="also measure the sections that the file already has")
    parser.add_argument("--minutes", type=float, default=9, help="no case starts after this time (default: 9)")
    parser.add_argument("--scattermoe", type=Path, help="folder with a copy of scattermoe")
    parser.add_argument("--output", type=Path, default=Path("gpu.md"), help="default: gpu.md; gpu.json goes beside it")
    arguments = parser.parse_args(argv)
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: torch sees no such device; --device cpu --tiny tries the script")
    place = Place(arguments.device, arguments.tiny, arguments.scattermoe)
    file, deadline = arguments.output.with_suffix(".json"), time.monotonic() + 60 * arguments.minutes
    results = read_results(file, place)
    for name in arguments.sections:
        if results["sections"].get(name, {}).get("complete") and not arguments.again:
            continue
        if time.monotonic() > deadline:
            print(f"{name}: left out, {arguments.minutes:g} minutes have passed; the same command goes on")
            continue
        results["sections"][name] = run_section(name, place, deadline)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        save(report(results, arguments), arguments.output)
        if is_broken(place):  # after a failed kernel only a new process can use the device
            return start_again(argv, deadline)
    failed = [case for section in results["sections"].values() for case in section["cases"] if has_failed(case)]
    for case in failed:
        print(f"FAILED {case['case']}: {case.get('failed', 'not ok')}")
    return 1 if failed else 0


def read_results(file: Path, place: Place) -> dict:
    """Reads the results so far; returns none if they come from another device or from other sizes."""
    new = {"device": place.name, "tiny": place.is_tiny, "torch": torch.__version__, "sections": {}}
    if not file.is_file():
        return new
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if all(found.get(key) == new[key] for key in ("device", "tiny", "torch")) else new


def run_section(name: str, place: Place, deadline: float) -> dict:
    """Returns a section's seconds, each case's values or error, and whether the time sufficed for all cases."""
    print(f"== {name}", flush=True)
    start, cases, complete = time.monotonic(), [], True
    for case in SECTIONS[name](place):
        if time.monotonic() > deadline:
            complete = False
            break
        cases.append(run_case(case, place))
    return {"seconds": round(time.monotonic() - start, 1), "complete": complete, "cases": cases}


def run_case(case: Case, place: Place) -> dict:
    values = {"case": case.name}
    try:
        values |= case.run()
    except Exception as error:  # here every kind of error is a result
        values["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    release(place)
    print("  " + ", ".join(f"{name}: {shown(value)}" for name, value in values.items()), flush=True)
    return values


def has_failed(case: dict) -> bool:
    return "failed" in case or case.get("ok") is False


def start_again(argv: list[str] | None, deadline: float) -> int:
    """Continues in a new process, with the time that is left."""
    minutes = max(0.0, (deadline - time.monotonic()) / 60)
    given = [option for option in (sys.argv[1:] if argv is None else argv) if option != "--again"]
    command = [sys.executable, os.path.abspath(__file__), *given, "--minutes", f"{minutes:.2f}"]
    return subprocess.run(command, check=False).returncode


def report(results: dict, arguments) -> list[str]:
    """Returns the Markdown lines of all sections."""
    facts = argparse.Namespace(device=arguments.device, dtype="types as named")
    lines = heading("On a GPU", "one device", facts)
    if results["tiny"]:
        lines += ["Tiny sizes: these numbers only show that the script runs.", ""]
    for name in SECTIONS:
        if section := results["sections"].get(name):
            lines += [
                f"## {name[0].upper()}{name[1:]}",
                "",
                f"{section['seconds']} s",
                "",
                *table(section["cases"]),
                "",
            ]
    return lines


def table(cases: list[dict]) -> list[str]:
    columns = list(dict.fromkeys(name for case in cases for name in case))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return lines + ["| " + " | ".join(cells(case, columns)) + " |" for case in cases]


def cells(case: dict, columns: list[str]) -> Iterable[str]:
    return (shown(case[name]).replace("|", "/") if name in case else "" for name in columns)


def shown(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.exit(main())
