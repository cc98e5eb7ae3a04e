"""A sweep of training runs: what is finished is kept, what was killed goes on, what is another run's is refused."""

import json
import shutil

import pytest
from tiny_runs import write_config

from moe_hf.errors import InputError
from moe_hf.training import sweep
from moe_hf.training.arguments import parse_arguments

VARIANTS = {"wide": {"moe_intermediate_size": 16}, "no-loss": {"importance_loss_coef": 0.0, "load_loss_coef": 0.0}}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_config(folder)
    return folder


@pytest.fixture(scope="module")
def swept(config):
    """The runs of the first time."""
    return run_sweep(config)


def run_sweep(config, *overrides, variants=VARIANTS, seeds=(1,)):
    arguments = parse_arguments([str(config / "config.yaml"), *overrides])
    return list(sweep.train_variants(*arguments, variants, list(seeds)))


def test_each_variant_is_its_model_in_its_folder(config, swept):
    assert [(name, seed, folder.name) for name, seed, folder in swept] == [
        ("wide", 1, "wide-seed1"),
        ("no-loss", 1, "no-loss-seed1"),
    ]
    saved = [json.loads((folder / "config.json").read_text()) for _, _, folder in swept]
    assert [model["moe_intermediate_size"] for model in saved] == [16, 8]
    assert [model["load_loss_coef"] for model in saved] == [0.1, 0.0]


def test_finished_runs_are_kept_and_only_the_others_trained(config, swept, monkeypatch):
    trained = []
    monkeypatch.setattr(sweep, "train_lm", lambda *arguments: trained.append(arguments[2].output_dir))
    (swept[1][2] / "eval_results.json").rename(config / "aside.json")
    assert [folder for _, _, folder in run_sweep(config)] == [folder for _, _, folder in swept]
    assert trained == [str(swept[1][2])]
    (config / "aside.json").rename(swept[1][2] / "eval_results.json")


def test_another_seed_is_another_run(config, swept):
    folders = [folder for _, _, folder in run_sweep(config, seeds=(2,), variants={"wide": VARIANTS["wide"]})]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (*folders, swept[0][2])]
    assert weights[0] != weights[1]
    shutil.rmtree(folders[0])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [(("--learning_rate", "0.5"), "learning_rate=0.5"), (("--max_steps", "5"), "max_steps=5.*the 4 of the finished")],
)
def test_a_finished_run_of_other_arguments_is_refused(config, swept, overrides, named):
    with pytest.raises(InputError, match=named):
        run_sweep(config, *overrides)


def test_a_wrong_variant_is_named(config):
    with pytest.raises(InputError, match="variant 'a': .*'num_expert'"):
        run_sweep(config, variants={"a": {"num_expert": 1}})
