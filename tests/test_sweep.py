"""A sweep of training runs: what is finished is kept, what was killed goes on, what is another run's is refused."""

import dataclasses
import json
import shutil

import pytest
from tiny_runs import write_config

from moe_hf.errors import InputError
from moe_hf.training import sweep
from moe_hf.training.arguments import parse_arguments
from moe_hf.training.lm import load_text
from moe_hf.training.tokenizers import load_tokenizer

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
    return list(sweep.train_variants(*arguments, variants, list(seeds), **options))


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
    assert [folder for _, _, folder in runs] == [folder for _, _, folder in swept]
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


@pytest.mark.parametrize("argument", ["seed", "output_dir"])
def test_what_tells_runs_apart_cannot_be_varied(config, argument):
    with pytest.raises(InputError, match=f"variant 'a': {argument} is not a variant's"):
        run_sweep(config, variants={"a": {argument: 3}})


def test_data_and_training_can_be_varied_too(config):
    seen = {}
    changes = {"max_steps": 2, "window_length": 5, "num_experts": 8}
    run_sweep(config, variants={"a": changes, "b": {}}, train=lambda *given: seen.update({given[2].output_dir: given}))
    (a_model, a_data, a_training), (b_model, b_data, b_training) = seen.values()
    assert (a_model.num_experts, a_data.window_length, a_training.max_steps) == (8, 5, 2)
    assert (b_model.num_experts, b_data.window_length, b_training.max_steps) == (4, 7, 4)


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
