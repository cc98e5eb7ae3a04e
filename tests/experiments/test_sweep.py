"""A sweep of training runs keeps finished runs, resumes killed runs, and refuses folders of other runs."""

import dataclasses
import json
import shutil

import pytest
import yaml
from tiny_runs import write_config

from moe_hf.data.tokenizers import load_tokenizer
from moe_hf.errors import InputError
from moe_hf.experiments import sweep
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.lm import load_text

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


def run_sweep(config, *overrides, variants=VARIANTS, seeds=(1,), **options):
    arguments = parse_arguments([str(config / "config.yaml"), *overrides])
    runs = sweep.train_runs(sweep.variant_runs(*arguments, variants, list(seeds), **options))
    return [(run.name, run.seed, run.folder) for run in runs]


def test_each_variant_is_its_model_in_its_folder(config, swept):
    assert [(name, seed, folder.name) for name, seed, folder in swept] == [
        ("wide", 1, "wide-seed1"),
        ("no-loss", 1, "no-loss-seed1"),
    ]
    saved = [json.loads((folder / "config.json").read_text()) for _, _, folder in swept]
    assert [model["moe_intermediate_size"] for model in saved] == [16, 8]
    assert [model["load_loss_coef"] for model in saved] == [0.1, 0.0]


def test_finished_runs_are_kept_and_only_the_others_trained(config, swept):
    trained = []
    (swept[1][2] / "eval_results.json").rename(config / "aside.json")
    runs = run_sweep(config, train=lambda *arguments: trained.append(arguments[2].output_dir))
    assert runs == swept[:1]  # what was not really trained is not finished
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


def test_a_finished_run_of_other_epochs_is_refused(tmp_path):
    write_config(tmp_path)
    options = ("--max_steps", "-1", "--num_train_epochs")
    run_sweep(tmp_path, *options, "1")
    assert run_sweep(tmp_path, *options, "1")
    with pytest.raises(InputError, match="num_train_epochs=2.*differs from the 1 of the finished run"):
        run_sweep(tmp_path, *options, "2")


def test_a_wrong_variant_is_named(config):
    with pytest.raises(InputError, match="variant 'a': 'num_expert' is not an argument"):
        run_sweep(config, variants={"a": {"num_expert": 1}})


@pytest.mark.parametrize(
    "argument", ["seed", "output_dir", "vocab_size", "bf16", "resume_from_checkpoint", "train_pairs"]
)
def test_what_is_set_up_before_cannot_be_varied(config, argument):
    with pytest.raises(
        InputError, match=f"variant 'a': '{argument}' is not an argument of the model, nor one of train_pairs"
    ):
        run_sweep(config, variants={"b": {}, "a": {argument: 3}})
    assert not (config / "run" / "b-seed1").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_steps": "x"}, "'a': max_steps='x' must be of type int"),
        ({"max_steps": 2.5}, "'a': max_steps=2.5 must be of type int"),
        ({"warmup_steps": True}, "'a': warmup_steps=True must be of type int"),
        ({"learning_rate": None}, "'a': learning_rate=None must be of type float"),
    ],
)
def test_a_wrong_number_is_named(config, changes, named):
    with pytest.raises(InputError, match=named):
        run_sweep(config, variants={"a": changes})


def test_the_length_of_a_training_can_be_varied(config):
    changes = {"max_steps": 2, "learning_rate": "1e-2", "moe_intermediate_size": 12}
    (run,) = run_sweep(config, variants={"short": changes})
    state = json.loads((run[2] / "trainer_state.json").read_text())
    assert state["max_steps"] == 2
    assert yaml.safe_load((run[2] / "run.yaml").read_text())["learning_rate"] == 0.01
    assert run_sweep(config, variants={"short": changes}) == [run]
    with pytest.raises(InputError, match="learning_rate=0.02 differs from learning_rate=0.01"):
        run_sweep(config, variants={"short": changes | {"learning_rate": 0.02}})
    shutil.rmtree(run[2])


def test_a_finished_run_of_other_arguments_stops_the_sweep_before_it_trains(config, swept):
    trained = []
    with pytest.raises(InputError, match="moe_intermediate_size=20 differs"):
        run_sweep(
            config, variants={"new": {}, "wide": {"moe_intermediate_size": 20}}, train=lambda *a: trained.append(1)
        )
    assert not trained


def test_all_runs_share_one_tokenizer_trained_once(config, tmp_path, monkeypatch):
    _, data_args, training_args = parse_arguments([str(config / "config.yaml"), "--output_dir", str(tmp_path / "s")])
    trained = []
    train = sweep.load_or_train_tokenizer
    monkeypatch.setattr(sweep, "load_or_train_tokenizer", lambda *a, **kw: trained.append(1) or train(*a, **kw))
    shared = [sweep.with_shared_tokenizer(data_args, training_args) for _ in range(2)]
    assert trained == [1] and shared[0] == shared[1] and data_args.tokenizer_name_or_path is None
    own = train(None, load_text(data_args, "train"), kind=data_args.tokenizer_kind, vocab_size=data_args.vocab_size)
    assert load_tokenizer(shared[0].tokenizer_name_or_path).get_vocab() == own.get_vocab()
    assert sweep.with_shared_tokenizer(shared[0], training_args) is shared[0]
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["tokenizer"]
    with pytest.raises(InputError, match="vocab_size=40 differs from vocab_size=50"):
        sweep.with_shared_tokenizer(dataclasses.replace(data_args, vocab_size=40), training_args)
