"""Runs and checkpoints that are damaged, belong to another run, or try to execute code when they are read."""

import functools
import io
import json
import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from bad_inputs import RUN, Case, Outcome, Place, judge

from moe_hf import cli
from moe_hf.checksums import CHECKSUM_FILE

LAST, STEP_2 = "run/checkpoint-4", "run/checkpoint-2"


class Touch:
    """Unpickled, it creates a file; nothing that reads a checkpoint may do so."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


# Kinds of damage to a checkpoint.


def missing(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garbled(file: Path) -> None:
    file.write_bytes(b"\xff\x00" * 50)


def a_list(file: Path) -> None:
    file.write_text("[1, 2]") if file.suffix == ".json" else torch.save([1, 2], file)


def an_empty_map(file: Path) -> None:
    file.write_text("{}") if file.suffix == ".json" else torch.save({}, file)


def a_flipped_bit(file: Path) -> None:
    """In the last byte but 40: a weight, or a digit in a text."""
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)


def another_step(file: Path) -> None:
    """One digit, in a file that stays a good one."""
    file.write_text(file.read_text().replace('"global_step": 4', '"global_step": 3'))


def executes(file: Path) -> None:
    torch.save({"state": Touch(marker_of(file)), "param_groups": []}, file)


def executes_as_plain_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(Touch(marker_of(file))))


def marker_of(file: Path) -> Path:
    [run] = (folder for folder in file.parents if folder.name == "run")
    return run.with_name(f"executed-by-{file.name}")


def executes_as_weights(file: Path) -> None:
    """In place of the safetensors file."""
    file.unlink()
    executes(file.with_name("pytorch_model.bin"))


# The commands.


def resumed(place: Place, which=(), **changes) -> list:
    """Returns the command that resumes `run` for its four steps."""
    return ["train-lm", place.lm_config(with_text=True, **RUN | changes), "--resume_from_checkpoint", *which]


def lm(place: Place) -> Path:
    return place.lm("run", checksums=True)


def sharded(place: Place) -> Path:
    """A run with carried state that saves in shards."""
    return Path(shutil.copytree(_sharded_run(), place / "run"))


@functools.cache
def _sharded_run() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="moe-hf-sharded-")
    _kept.append(folder)
    place = Place(Path(folder.name))
    assert cli.main([str(argument) for argument in resumed(place, **SHARDED)]) == 0
    return place / "run"


_kept = []
SHARDED = {"expert_parallel_size": -1, "carry_state": True}


def damage(name: str, how, *, run=lm, checksums: bool) -> Case:
    """A named checkpoint with one file damaged is refused; `checksums` False: it is of a release without them."""

    def command(place: Place) -> list:
        run(place)
        _damage(place, name, how, checksums)
        return resumed(place, [place / LAST], **(SHARDED if run is sharded else {}))

    return Case(_title(name, how, run, checksums), command, ("checkpoint-4", name), check=nothing_executed)


def passed_over(name: str, how, *, run=lm, checksums: bool) -> Case:
    """`last` takes the checkpoint before it, says so, and ends with the weights that were there."""

    def command(place: Place) -> list:
        run(place)
        shutil.copy(place / "run/model.safetensors", place / "expected.safetensors")
        _damage(place, name, how, checksums)
        return resumed(place, ["last"], **(SHARDED if run is sharded else {}))

    def check(place: Place, outcome: Outcome) -> str | None:
        same = (place / "run/model.safetensors").read_bytes() == (place / "expected.safetensors").read_bytes()
        return nothing_executed(place, outcome) or (None if same else "other weights than before")

    title = f"last: {_title(name, how, run, checksums)}"
    return Case(title, command, ("checkpoint-4", name, "checkpoint-2"), ends="recovers", check=check)


def averaged(name: str, how, *, run=lm, checksums: bool = False) -> Case:
    def command(place: Place) -> list:
        run(place)
        _damage(place, name, how, checksums)
        return ["average", place / "run", place / "mean", "--last", "2"]

    def check(place: Place, outcome: Outcome) -> str | None:
        return nothing_executed(place, outcome) or ("wrote a model" if (place / "mean").exists() else None)

    return Case(f"average: {_title(name, how, run, checksums)}", command, ("checkpoint-4", name), check=check)


def _damage(place: Place, name: str, how, checksums: bool) -> None:
    how(place / LAST / name)
    if not checksums:
        (place / LAST / "checksums.json").unlink(missing_ok=True)


def _title(name, how, run, checksums) -> str:
    what = f"{name} {how.__name__.replace('_', ' ')}"
    return what + (" of shards" if run is sharded else "") + ("" if checksums else ", before checksums")


def nothing_passed_over(place: Place, outcome: Outcome) -> str | None:
    return "the last checkpoint was passed over" if "skipped" in outcome.err else None


def nothing_executed(place: Place, outcome: Outcome) -> str | None:
    markers = [marker.name for marker in place.folder.glob("executed-by-*")]
    return f"executed: {markers}" if markers else None


# Runs without a checkpoint left, and folders that are not checkpoints.


def every_checkpoint_broken(place: Place) -> list:
    lm(place)
    for checkpoint in (LAST, STEP_2):
        truncated(place / checkpoint / "model.safetensors")
    return resumed(place)


def stays(place: Place, outcome: Outcome) -> str | None:
    return None if (place / LAST).is_dir() and (place / STEP_2).is_dir() else "a checkpoint is gone"


def killed_before_the_first(place: Place) -> list:
    lm(place)
    for path in (place / "run").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("run.yaml", "run_arguments.json", "expert_history.csv"):
            path.unlink()
    return resumed(place)


def killed_while_saving_the_first(place: Place) -> list:
    arguments = killed_before_the_first(place)
    shutil.copytree(place.lm("whole", checksums=True) / "checkpoint-2", place / STEP_2)
    for name in ("trainer_state.json", "checksums.json"):
        (place / STEP_2 / name).unlink()
    return arguments


def killed_while_writing_the_first_state(place: Place) -> list:
    arguments = killed_while_saving_the_first(place)
    (place / STEP_2 / "trainer_state.json").touch()
    return arguments


def evaluated_with_record(place: Place) -> list:
    lm(place)
    text = place.file("text.txt", "the cat saw a dog\n" * 40)
    assert cli.main(["evaluate", str(place / LAST), str(text), "--record"]) == 0
    return resumed(place, max_steps=5)


def with_a_best_checkpoint(how, *, checksums: bool):
    """A run that ends with the model of checkpoint-2, which is damaged."""

    def command(place: Place) -> list:
        place.lm("run", checksums=checksums)
        state = json.loads((place / LAST / "trainer_state.json").read_text())
        state |= {"best_model_checkpoint": str(place / STEP_2), "best_metric": 0.0, "best_global_step": 2}
        (place / LAST / "trainer_state.json").write_text(json.dumps(state))
        (place / LAST / CHECKSUM_FILE).unlink(missing_ok=True)
        how(place / STEP_2 / "model.safetensors")
        return resumed(place, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)

    return command


def leaves(*names: str):
    """A new run in a folder where a run that was killed, or failed at once, left these files."""

    def command(place: Place) -> list:
        for name in names:
            place.file(f"run/{name}", "{}")
        return resumed(place)[:-1]

    return command


def finished_without_checkpoints(place: Place) -> list:
    lm(place)
    for checkpoint in (LAST, STEP_2):
        shutil.rmtree(place / checkpoint)
    return resumed(place)


def named(which: str) -> Case:
    def command(place: Place) -> list:
        lm(place)
        place.file("run/a_file", "x")
        return resumed(place, [which and place / which])

    return which, command


def run_of_another_family(place: Place) -> list:
    place.translator("other")
    return ["train-lm", place.lm_config(), "--resume_from_checkpoint", place / "other/checkpoint-4"]


def language_model_for_translation(place: Place) -> list:
    place.lm("other")
    return ["train-translation", place.translation_config(), "--resume_from_checkpoint", place / "other/checkpoint-4"]


def weights_of_another_size(place: Place) -> list:
    lm(place)
    (place / "run/run_arguments.json").unlink()
    return resumed(place, [place / LAST], hidden_size=12)


def another_size(place: Place) -> list:
    lm(place)
    return ["train-lm", place.lm_config(hidden_size=12), "--resume_from_checkpoint"]


def another_size_of_shards(place: Place) -> list:
    sharded(place)
    (place / "run/run_arguments.json").unlink()
    return resumed(place, [place / LAST], hidden_size=12, **SHARDED)


def shards_without_sharding_of_another_size(place: Place) -> list:
    sharded(place)
    (place / "run/run_arguments.json").unlink()
    return resumed(place, [place / LAST], hidden_size=12, carry_state=True)


def weights_lack_a_layer(place: Place) -> list:
    lm(place)
    (place / "run/run_arguments.json").unlink()
    return resumed(place, [place / LAST], layer_pattern=["lstm", "moe", "lstm", "lstm"])


def optimizer_of_another_model(place: Place) -> list:
    lm(place)
    (place / LAST / "checksums.json").unlink(missing_ok=True)
    state = torch.load(place / LAST / "optimizer.pt")
    del state["state"][0], state["param_groups"][0]["params"][0]
    torch.save(state, place / LAST / "optimizer.pt")
    return resumed(place, [place / LAST])


def optimizer_of_another_width(place: Place) -> list:
    lm(place)
    (place / LAST / "checksums.json").unlink(missing_ok=True)
    state = torch.load(place / STEP_2 / "optimizer.pt")
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:, :3].clone()
    torch.save(state, place / STEP_2 / "optimizer.pt")
    (place / STEP_2 / "checksums.json").unlink(missing_ok=True)
    return resumed(place, [place / STEP_2])


def into_another_run(place: Place) -> list:
    lm(place)
    place.lm("other")
    return resumed(place, [place / "other/checkpoint-2"])


def damaged_arguments(how):
    def command(place: Place) -> list:
        how(lm(place) / "run_arguments.json")
        return ["train-lm", place.lm_config(), "--resume_from_checkpoint"]

    return command


def without_carried_state(place: Place) -> list:
    sharded(place)
    (place / LAST / "checksums.json").unlink(missing_ok=True)
    (place / LAST / "carried_state_0.pt").unlink()
    (place / "run/run_arguments.json").unlink()
    return resumed(place, [place / LAST], max_steps=6, **SHARDED)


def not_of_carry_state(place: Place, outcome: Outcome) -> str | None:
    return "claims carry_state=False" if "carry_state=False" in outcome.err else None


def executes_in_bytes(place: Place, checkpoint: Path) -> None:
    """Replaces a number of the optimizer's groups by a pickle: the library unpickles any content there."""
    folder = checkpoint / "optimizer"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index, part = next(item for item in metadata.storage_data.items() if item[0].fqn.endswith(".lr"))
    planted = io.BytesIO()
    torch.save(Touch(marker_of(folder / "bytes")), planted)
    file = folder / part.relative_path
    part.offset, part.length = file.stat().st_size, len(planted.getvalue())
    file.write_bytes(file.read_bytes() + planted.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def resumed_from_bytes_that_execute(place: Place) -> list:
    sharded(place)
    (place / LAST / "checksums.json").unlink(missing_ok=True)
    executes_in_bytes(place, place / LAST)
    return resumed(place, [place / LAST], max_steps=6, **SHARDED)


def arguments_that_execute(place: Place) -> list:
    """Damages training_args.bin, a file that nothing reads."""
    lm(place)
    _damage(place, "training_args.bin", executes, checksums=False)
    return resumed(place, [place / LAST])


def average_of_a_checkpoint(place: Place) -> list:
    lm(place)
    return ["average", place / LAST, place / "mean"]


def average_of_shards(place: Place) -> list:
    sharded(place)
    shutil.rmtree(place / STEP_2)
    shutil.copytree(place / LAST, place / "run/checkpoint-6")
    for checkpoint in (LAST, "run/checkpoint-6"):
        executes_as_plain_pickle(place / checkpoint / "optimizer/.metadata")
    return ["average", place / "run", place / "mean", "--last", "2"]


def average_of_two_sizes(place: Place) -> list:
    lm(place)
    place.translator("other")
    shutil.rmtree(place / STEP_2)
    shutil.copytree(place / "other/checkpoint-2", place / STEP_2)
    return ["average", place / "run", place / "mean", "--last", "2"]


def average_of_an_unknown_model(place: Place) -> list:
    lm(place)
    for checkpoint in (LAST, STEP_2):
        file = place / checkpoint / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "nothing"}))
        (place / checkpoint / "checksums.json").unlink(missing_ok=True)
    return ["average", place / "run", place / "mean", "--last", "2"]


CASES = [
    # The files look whole: only the checksums show the damage.
    damage("model.safetensors", a_flipped_bit, checksums=True),
    damage("trainer_state.json", another_step, checksums=True),
    damage("optimizer.pt", an_empty_map, checksums=True),
    damage("tokenizer.json", missing, checksums=True),
    damage("rng_state.pth", missing, checksums=True),
    damage("checksums.json", truncated, checksums=True),
    damage("shard-00001-model-00001-of-00001.safetensors", a_flipped_bit, run=sharded, checksums=True),
    damage("optimizer/__0_0.distcp", a_flipped_bit, run=sharded, checksums=True),
    passed_over("model.safetensors", a_flipped_bit, checksums=True),
    passed_over("optimizer/__0_0.distcp", a_flipped_bit, run=sharded, checksums=True),
    averaged("model.safetensors", a_flipped_bit, checksums=True),
    # A file of the wrong kind.
    damage("config.json", a_list, checksums=False),
    damage("generation_config.json", truncated, checksums=False),
    damage("optimizer.pt", a_list, checksums=False),
    damage("scheduler.pt", a_list, checksums=False),
    damage("scheduler.pt", an_empty_map, checksums=False),
    damage("rng_state.pth", missing, checksums=False),
    damage("rng_state.pth", a_list, checksums=False),
    damage("rng_state.pth", an_empty_map, checksums=False),
    damage("trainer_state.json", a_list, checksums=False),
    damage("trainer_state.json", an_empty_map, checksums=False),
    damage("tokenizer.json", truncated, checksums=False),
    damage("tokenizer.json", an_empty_map, checksums=False),
    damage("tokenizer.json", missing, checksums=False),
    damage("tokenizer_config.json", a_list, checksums=False),
    damage("carried_state_0.pt", missing, run=sharded, checksums=False),
    damage("carried_state_0.pt", a_list, run=sharded, checksums=False),
    damage("optimizer/.metadata", garbled, run=sharded, checksums=False),
    damage("scheduler.pt", a_list, run=sharded, checksums=False),
    passed_over("tokenizer.json", truncated, checksums=False),
    passed_over("rng_state.pth", missing, checksums=False),
    passed_over("carried_state_0.pt", missing, run=sharded, checksums=False),
    averaged("config.json", a_list),
    averaged("tokenizer.json", garbled),
    averaged("model.safetensors", empty),
    # Files that execute code.
    damage("optimizer/.metadata", executes_as_plain_pickle, run=sharded, checksums=False),
    damage("optimizer.pt", executes, checksums=False),
    damage("optimizer.pt", executes_as_plain_pickle, checksums=False),
    damage("scheduler.pt", executes, checksums=False),
    damage("rng_state.pth", executes, checksums=False),
    damage("carried_state_0.pt", executes, run=sharded, checksums=False),
    damage("model.safetensors", executes_as_weights, checksums=False),
    passed_over("optimizer/.metadata", executes_as_plain_pickle, run=sharded, checksums=False),
    averaged("model.safetensors", executes_as_weights),
    Case("bytes of a sharded optimizer execute", resumed_from_bytes_that_execute, "optimizer", check=nothing_executed),
    Case("training_args.bin executes", arguments_that_execute, ends="recovers", check=nothing_executed),
    # The choice of the checkpoint.
    Case("every checkpoint broken", every_checkpoint_broken, ("checkpoint-4", "output_dir="), check=stays),
    Case("killed before the first checkpoint", killed_before_the_first, "no complete checkpoint", ends="recovers"),
    Case("killed while saving the first", killed_while_saving_the_first, "no complete checkpoint", ends="recovers"),
    Case(
        "killed while writing the first state",
        killed_while_writing_the_first_state,
        "no complete checkpoint",
        ends="recovers",
    ),
    Case("killed while writing", leaves(".unfinished-a/file"), ends="recovers"),
    Case("failed at once", leaves("run.lock", "run.yaml", "run_arguments.json"), ends="recovers"),
    Case("evaluated with --record", evaluated_with_record, ends="recovers", check=nothing_passed_over),
    *(
        Case(
            f"the best checkpoint, {how.__name__}, checksums={checksums}",
            with_a_best_checkpoint(how, checksums=checksums),
            ("checkpoint-2", "model", "--load_best_model_at_end false"),
        )
        for how, checksums in [(truncated, False), (missing, False), (a_flipped_bit, True)]
    ),
    Case("finished without checkpoints", finished_without_checkpoints, ("output_dir=", "model.safetensors")),
    Case("the run's folder", named("run")[1], ("resume_from_checkpoint=", "checkpoint-4")),
    Case("a file", named("run/a_file")[1], ("resume_from_checkpoint=", "a_file", "folder")),
    Case("checkpoint-abc", named("run/checkpoint-abc")[1], ("resume_from_checkpoint=", "checkpoint-abc", "last")),
    Case("an empty name", named("")[1], "resume_from_checkpoint="),
    Case("a checkpoint of another run", into_another_run, ("output_dir=", "resume_from_checkpoint")),
    Case("a translation model's", run_of_another_family, ("resume_from_checkpoint=", "gnmt_moe", "lstm_moe")),
    Case("a language model's", language_model_for_translation, ("resume_from_checkpoint=", "gnmt_moe", "lstm_moe")),
    Case("another hidden_size", another_size, ("hidden_size=12", "hidden_size=8")),
    Case("weights of another size", weights_of_another_size, ("checkpoint-4", "weights")),
    Case("shards of another size", another_size_of_shards, "checkpoint-4"),
    Case("shards of another size, whole", shards_without_sharding_of_another_size, "checkpoint-4"),
    Case("weights that lack a layer", weights_lack_a_layer, ("checkpoint-4", "weights")),
    Case("optimizer of another model", optimizer_of_another_model, ("checkpoint-4", "optimizer")),
    Case("optimizer of another width", optimizer_of_another_width, ("checkpoint-2", "optimizer")),
    Case("run_arguments.json truncated", damaged_arguments(truncated), "run_arguments.json"),
    Case("run_arguments.json a list", damaged_arguments(a_list), "run_arguments.json"),
    Case("no carried state", without_carried_state, "carried_state_0.pt", check=not_of_carry_state),
    Case("average of a checkpoint", average_of_a_checkpoint, ("run=", "checkpoint-N")),
    Case("average of shards that execute", average_of_shards, ("checkpoint-4", "sharded"), check=nothing_executed),
    Case("average of two families", average_of_two_sizes, ("checkpoint-2", "checkpoint-4")),
    Case("average of an unknown model", average_of_an_unknown_model, ("checkpoint-4", "nothing")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage_is_named(case, tmp_path):
    verdict = judge(case, tmp_path)
    assert not verdict.fault, f"{verdict.fault}: {verdict.why}"
