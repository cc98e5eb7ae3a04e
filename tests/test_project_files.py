"""The project's files agree with the package."""

import re
from pathlib import Path

import yaml

import moe_hf

ROOT = Path(__file__).parents[1]


def test_the_citation_has_the_version_and_the_licence_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == moe_hf.__version__
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_ci_runs_everything_that_the_contributors_are_asked_to_run():
    commands = set(re.findall(r"^make ([\w-]+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE))
    asked = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("CI runs `.ci/run`, which is")[2]
    assert commands == set(re.findall(r"`([\w-]+)`", asked.partition(".")[0]))
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]["ci"][
        "steps"
    ]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]


def test_every_target_that_the_contributors_may_run_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make ([\w-]+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert named - {"test-fast"} <= targets and len(named) > 5
