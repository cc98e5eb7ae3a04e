"""Trainings that diverge, that another run disturbs, or that resume from a damaged checkpoint."""

import math

import pytest
import torch
from bad_inputs import Case, Place, judge
from filelock import FileLock
from safetensors.torch import load_file, save_file

from moe_hf.models.finite import first_non_finite

SAVED = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}
UNSAVED = {"save_strategy": "no", "eval_strategy": "no"}
SHORT = {"logging_steps": 1, "max_steps": 3, "warmup_steps": 0, "lr_scheduler_type": "constant", "constant_steps": 0}


def _config(place: Place, command: str, **changes):
    if command == "train-lm":
        changes.pop("constant_steps", None)
        return place.lm_config(with_text=True, **changes)
    return place.translation_config(with_text=True, **changes)


def _diverges(command: str, **changes):
    return lambda place: [command, _config(place, command, **(SHORT | UNSAVED | changes))]


def _whatever_is_saved_is_finite(place: Place, outcome) -> str | None:
    for file in place.folder.rglob("*.safetensors"):
        if name := first_non_finite(load_file(file).items()):
            return f"{file} has {name}"
    for file in place.folder.rglob("optimizer.pt"):
        states = torch.load(file)["state"].values()
        if first_non_finite((key, x) for state in states for key, x in state.items() if isinstance(x, torch.Tensor)):
            return f"{file} is not finite"
    if outcome.err.rstrip().endswith("has no checkpoint yet") != (not list(place.folder.rglob("trainer_state.json"))):
        return "the message says what is not so"
    return None


def _resumes(command: str, spoil, resume: str = "last"):
    def arguments(place: Place):
        original = place.lm("run") if command == "train-lm" else place.translator("run")
        spoil(original / "checkpoint-4")
        config = _config(place, command, save_strategy="steps", save_steps=2, max_steps=6, eval_strategy="no")
        return [command, config, "--resume_from_checkpoint", resume.format(run=original)]

    return arguments


def _spoil_weight(value: float):
    def spoil(folder):
        weights = load_file(folder / "model.safetensors")
        name = min(weights)
        weights[name].view(-1)[-1] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def _spoil_optimizer(folder):
    state = torch.load(folder / "optimizer.pt")
    state["state"][0]["exp_avg_sq"].view(-1)[-1] = math.inf
    torch.save(state, folder / "optimizer.pt")


_held = []


def _beside_another_run(command: str, *options: str):
    def arguments(place: Place):
        (place / "run").mkdir()
        _held.append(FileLock(place / "run/run.lock", timeout=0))
        _held[-1].acquire()
        changes = {} if command == "train-lm" else {"train_source_files": ["/nowhere/text.en"]}
        return [command, (place.lm_config if command == "train-lm" else place.translation_config)(**changes), *options]

    return arguments


def _writes_nothing(place: Place, outcome) -> str | None:
    _held.pop().release()
    left = {path.name for path in (place / "run").iterdir()} - {"run.lock"}
    return f"the run has {left}" if left else None


def _into(output_dir: str):
    def arguments(place: Place):
        place.file("file", "")
        return ["train-lm", place.lm_config(output_dir=output_dir.format(place=place.folder))]

    return arguments


DIVERGES = {
    "learning_rate=1e30": {"learning_rate": 1e30},
    "learning_rate=1e38": {"learning_rate": 1e38},
    "learning_rate=1e38, and every step is saved": {"learning_rate": 1e38} | SAVED,
    "sgd": {"learning_rate": 1e38, "optim": "sgd"} | SAVED,
    "factored_adam": {"learning_rate": 1e38, "optim": "factored_adam"} | SAVED,
    "bf16": {"learning_rate": 1e38, "bf16": True} | SAVED,
    "without clipping": {"learning_rate": 1e38, "max_grad_norm": 0} | SAVED,
    "in the last step": {"learning_rate": 1e38, "weight_decay": 1e10, "max_steps": 1},
    "in the last step, which is saved": {"learning_rate": 1e38, "weight_decay": 1e10, "max_steps": 1} | SAVED,
    "balancing losses": {"learning_rate": 1e-3, "importance_loss_coef": 1e38, "load_loss_coef": 1e38} | SAVED,
}
COMMANDS = ("train-lm", "train-translation")
NOT_FINITE = ("checkpoint",)
CASES = [
    *(
        Case(f"{command}: {name}", _diverges(command, **changes), NOT_FINITE, check=_whatever_is_saved_is_finite)
        for command in COMMANDS
        for name, changes in DIVERGES.items()
    ),
    *(
        Case(f"{command}: {value} in a checkpoint's weight", _resumes(command, _spoil_weight(value)), "checkpoint-4")
        for command in COMMANDS
        for value in (math.nan, math.inf)
    ),
    *(
        Case(f"{command}: an optimizer that is not finite", _resumes(command, _spoil_optimizer), "exp_avg_sq")
        for command in COMMANDS
    ),
    Case("a named checkpoint", _resumes("train-lm", _spoil_weight(math.nan), "{run}/checkpoint-4"), "checkpoint-4"),
    *(
        Case(
            f"{command} {' '.join(options)}: another run",
            _beside_another_run(command, *options),
            ("output_dir=", "is used"),
            check=_writes_nothing,
        )
        for command in COMMANDS
        for options in ((), ("--resume_from_checkpoint",))
    ),
    Case("a file as output_dir", _into("{place}/file"), ("output_dir=", "is a file")),
    Case("an output_dir in a file", _into("{place}/file/run"), ("output_dir=", "file/run")),
    Case("an output_dir that cannot be made", _into("/proc/run"), ("output_dir=/proc/run",)),
    *(
        Case(
            f"metric_for_best_model={name}",
            _diverges("train-lm", learning_rate=1e-3, eval_strategy="steps", eval_steps=1, metric_for_best_model=name),
            f"metric_for_best_model='{name}' is not known, use one of loss",
        )
        for name in ("bleu", "accuracy", "epoch")
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ends_with_one_line_and_nothing_spoilt(case, tmp_path):
    verdict = judge(case, tmp_path)
    assert not verdict.fault, f"{verdict.fault}: {verdict.why}"
