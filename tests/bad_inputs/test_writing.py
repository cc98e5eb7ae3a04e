"""Writing that fails: a full disk, a read-only place, a folder in place of a file and the reverse."""

import resource
import signal

import pytest
from bad_inputs import RUN, Case, Outcome, Place, judge

from moe_hf import cli
from moe_hf.training.lm_trainer import LmTrainer

LONG = "n" * 300
LINES = "the small cat\na dog\nno\n" * 8
UNLIMITED = resource.getrlimit(resource.RLIMIT_FSIZE)


@pytest.fixture(autouse=True)
def disk_with_space():
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, UNLIMITED)


def fill_disk(place: Place, num_bytes: int) -> None:
    """Let no file grow beyond that size; a file of the system then fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, UNLIMITED[1]))


def average(place, out):
    return ["average", place.lm("trained"), out, "--last", 2]


def upcycle(place, out):
    return ["upcycle", place.lm("trained"), out, "--num_experts", 8, "--num_expert_groups", 4]


def prune(place, out):
    return ["prune", place.lm("trained"), place.file("text.txt", LINES), out, "--keep", 2]


def push(place, out):
    return ["push", place.lm("trained"), "me/model", "--dry-run", out]


def report(place, out):
    return ["report", place.lm("trained"), place.file("text.txt", LINES), "-o", out]


def plot(place, out):
    return ["translate", place.translator("trained"), place.file("text.txt", LINES), "--attention_plot", out]


def evaluate(place, out):
    text = place.file("text.txt", LINES)
    return ["evaluate-translation", place.translator("trained"), text, text, "--num_beams", 1, "--output", out]


def over(name: str):
    """A command whose translations would overwrite its own input."""

    def command(place: Place) -> list:
        files = [place.file(f"text.{language}", "a dog\n") for language in ("en", "de")]
        return ["evaluate-translation", place.translator("trained"), *files, "--output", place / name]

    return command


def stay(place: Place, outcome: Outcome) -> str | None:
    is_there = all((place / f"text.{language}").read_text() == "a dog\n" for language in ("en", "de"))
    is_there = is_there and "gnmt_moe" in (place / "trained/config.json").read_text()
    return None if is_there else "a file was overwritten"


def train_lm(place, out):
    return ["train-lm", place.lm_config(output_dir=str(out))]


def train_translation(place, out):
    return ["train-translation", place.translation_config(output_dir=str(out))]


FOLDERS = {
    "below a file": lambda place: place.file("file.txt", "kept") / "out",
    "a file": lambda place: place.file("file.txt", "kept"),
    "in /proc": lambda place: "/proc/out",
    "a long name": lambda place: place / LONG,
    "empty": lambda place: "",
    "a dangling link": lambda place: link(place, "link", "/proc/nowhere/out"),
    "a loop of links": lambda place: link(place, "loop", place / "loop"),
    "a null byte": lambda place: f"{place.folder}/a\0b",
}


def link(place, name, to):
    (place / name).symlink_to(to)
    return place / name


def file_places(suffix):
    return {
        "a folder": lambda place: folder(place, f"out{suffix}"),
        "below a file": lambda place: place.file("file.txt", "kept") / f"out{suffix}",
        "in /proc": lambda place: f"/proc/out{suffix}",
        "a long name": lambda place: place / f"{LONG}{suffix}",
        "no such folder": lambda place: place / f"none/out{suffix}",
        "a dangling link": lambda place: link(place, f"link{suffix}", f"/proc/nowhere/out{suffix}"),
    }


def folder(place, name):
    (place / name).mkdir()
    return place / name


def left_alone(place, outcome):
    """Checks that only the case's own files are new, and that earlier files are unchanged."""
    made = {"trained", "text.txt", "config.yaml", "file.txt", "link", "loop", "out", "earlier", "full"}
    new = {p.name for p in place.folder.iterdir()} - made
    new = {name for name in new if not name.startswith(("out.", "link."))}
    if new or (place / "out").exists():
        return f"left: {sorted(new) or 'out'}"
    if (place / "file.txt").exists() and (place / "file.txt").read_text() != "kept":
        return "file.txt has changed"
    return None


def nothing_printed(place, outcome):
    return left_alone(place, outcome) or ("translated before the refusal" if outcome.out.strip() else None)


def at(what, command, places, argument, check=left_alone):
    for name, path in places.items():
        yield Case(
            f"{what}: {name}",
            lambda place, command=command, path=path: command(place, path(place)),
            (f"{argument}=",),
            check=check,
        )


def on_full_disk(name, command, says, num_bytes=3000, check=left_alone):
    def prepare(place):
        arguments = command(place, place / "out")
        fill_disk(place, num_bytes)
        return arguments

    return Case(f"{name}: full disk", prepare, says, check=check)


def some(places, *names):
    return {name: places[name] for name in names}


def train_until_full(num_bytes, command="train-lm", **changes):
    def prepare(place):
        config = place.lm_config if command == "train-lm" else place.translation_config
        arguments = [command, config(with_text=True, **RUN | changes)]
        fill_disk(place, num_bytes)
        return arguments

    return prepare


def no_broken_model(place, outcome):
    run = place / "run"
    names = {path.name for path in run.iterdir()} if run.is_dir() else set()
    if bad := names & {"checkpoint-2", "checkpoint-4", "model.safetensors"}:
        return f"left: {bad}"
    return f"left: {names}" if any(name.startswith((".", "tmp")) for name in names) else None


def to_full_device(place):
    return evaluate(place, "/dev/full")


def scores_are_printed(place, outcome):
    return None if "eval_bleu = " in outcome.out else "the scores are lost"


def record_on_full_disk(place):
    model = place.translator("trained")
    (model / "evaluations.json").symlink_to("/dev/full")
    return ["evaluate-translation", model, *[place.file("text.txt", LINES)] * 2, "--num_beams", 1, "--record"]


CASES = [
    *at("average", average, FOLDERS, "out"),
    *at("upcycle", upcycle, some(FOLDERS, "in /proc", "below a file", "empty"), "out"),
    *at("prune", prune, some(FOLDERS, "a file", "a long name", "in /proc"), "out"),
    *at("push", push, some(FOLDERS, "a file", "in /proc", "a dangling link", "empty"), "dry-run"),
    *at("report", report, file_places(".html"), "output"),
    *at("attention plot", plot, file_places(".png"), "attention_plot", nothing_printed),
    *at("translations", evaluate, file_places(".txt"), "output"),
    *at("train-lm", train_lm, FOLDERS, "output_dir"),
    *at("train-translation", train_translation, some(FOLDERS, "in /proc", "a long name", "a file"), "output_dir"),
    on_full_disk("average", average, ("out=", "File too large")),
    on_full_disk("upcycle", upcycle, ("out=", "File too large")),
    on_full_disk("prune", prune, ("out=", "File too large")),
    on_full_disk("push", push, ("dry-run=", "File too large")),
    on_full_disk("report", lambda place, out: report(place, f"{out}.html"), ("output=", "out.html", "File too large")),
    on_full_disk(
        "attention plot", lambda place, out: plot(place, f"{out}.png"), ("attention_plot=", "File too large")
    ),
    *(
        Case(f"the translations over the {name}", over(file), ("output=", f"would overwrite {name}="), check=stay)
        for name, file in [("source_file", "text.en"), ("target_file", "text.de"), ("model", "trained/config.json")]
    ),
    Case("scores beside /dev/full", to_full_device, ("output=/dev/full", "No space left"), check=scores_are_printed),
    Case("a record", record_on_full_disk, ("record", "evaluations.json", "No space left"), check=scores_are_printed),
    Case("run.yaml", train_until_full(100), ("output_dir=", "File too large")),
]
CASES += [
    Case(
        f"{command}'s checkpoint",
        train_until_full(9000, command),
        ("output_dir=", "checkpoint-2", "File too large"),
        check=no_broken_model,
    )
    for command in ("train-lm", "train-translation")
]
CASES += [
    Case(
        f"{command}'s model",
        train_until_full(9000, command, save_strategy="no"),
        ("output_dir=", "File too large", "--resume_from_checkpoint"),
        check=no_broken_model,
    )
    for command in ("train-lm", "train-translation")
]
CASES += [
    Case(
        f"cache_dir: {name}",
        lambda place, path=path: ["train-lm", place.lm_config(with_text=True, cache_dir=str(path(place)))],
        ("cache_dir=",),
    )
    for name, path in some(FOLDERS, "below a file", "in /proc", "a long name").items()
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_place_is_named_and_nothing_half_written_is_left(case, tmp_path):
    before = signal.getsignal(signal.SIGXFSZ)
    verdict = judge(case, tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, UNLIMITED)
    assert not verdict.fault, f"{verdict.fault}: {verdict.why}"
    assert signal.getsignal(signal.SIGXFSZ) == before


def test_a_run_goes_on_when_there_is_space_again(tmp_path, monkeypatch, capsys):
    place = Place(tmp_path)
    command = ["train-lm", str(place.lm_config(with_text=True, **RUN))]
    step = LmTrainer.training_step

    def until_full(self, *arguments):
        if self.state.global_step == 3:
            fill_disk(place, 9000)
        return step(self, *arguments)

    assert cli.main([*command, "--output_dir", str(place / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(LmTrainer, "training_step", until_full)
        assert cli.main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: output_dir=") and "checkpoint-4 cannot be written" in error
    assert "resume by the same command with --resume_from_checkpoint" in error
    assert [path.name for path in (place / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    resource.setrlimit(resource.RLIMIT_FSIZE, UNLIMITED)
    assert cli.main([*command, "--resume_from_checkpoint"]) == 0
    for name in ("model.safetensors", "expert_history.csv"):
        assert (place / "run" / name).read_bytes() == (place / "whole" / name).read_bytes()


@pytest.mark.parametrize("output", ["none/table.md", "/proc/table.md", ""])
def test_a_table_of_a_script_is_refused_before_the_work(output, tmp_path, call_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, error = call_script("specialisation.py", "nowhere", "nothing", "-o", output)
    assert (status, out) == (1, "") and error.startswith("error: output=") and error.count("\n") == 1


@pytest.mark.parametrize("name", ["capacity.py", "table6.py", "compare_translation.py"])
def test_a_sweep_is_refused_before_the_work(name, tmp_path, call_script):
    place = Place(tmp_path)
    config = place.translation_config if name == "compare_translation.py" else place.lm_config
    own = {"validation_source_files": ["/nowhere"], "validation_target_files": ["/nowhere"]}
    changes = own if name == "compare_translation.py" else {}
    if name != "table6.py":
        changes |= {"variants": {"one": {}}}
    status, out, error = call_script(name, config(output_dir="/proc/out", **changes))
    assert (status, out) == (1, "") and error.startswith("error: output_dir=/proc/out") and error.count("\n") == 1
