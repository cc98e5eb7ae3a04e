"""The configurations for GPUs: the paper's models and steps, and one file for both GPU and CPU."""

import logging
from pathlib import Path

import pytest
import yaml
from tiny_training import tiny_arguments

from moe_hf.data.arguments import DataArguments, TranslationDataArguments
from moe_hf.training.arguments import (
    LmModelArguments,
    MoeTrainingArguments,
    TranslationModelArguments,
    TranslationTrainingArguments,
    parse_arguments,
)
from moe_hf.training.run_checks import check_run

CONFIGS = Path(__file__).parents[2] / "configs"
LM = (LmModelArguments, DataArguments, MoeTrainingArguments)
TRANSLATION = (TranslationModelArguments, TranslationDataArguments, TranslationTrainingArguments)
# The paper's configuration, the classes, the number of GPUs.
GPU = {
    "one-gpu-lm": ("lm/moe-256", LM, 1),
    "one-gpu-translation": ("translation/moe-512-h", TRANSLATION, 1),
    "eight-gpus-expert-parallel": ("lm/moe-4096-h", LM, 8),
    "eight-gpus-hybrid": ("lm/moe-4096-h", LM, 8),
}
ACCELERATE = sorted((CONFIGS / "accelerate").glob("*.yaml"))


def parse(name, classes):
    return parse_arguments([str(CONFIGS / f"{name}.yaml")], classes)


def test_every_file_is_tested():
    assert {path.stem for path in (CONFIGS / "gpu").iterdir()} == set(GPU)


@pytest.mark.parametrize("name", GPU)
def test_the_model_and_the_step_are_the_papers(name):
    reference, classes, devices = GPU[name]
    (model, data, training), (papers, papers_data, papers_training) = (
        parse(f"gpu/{name}", classes),
        parse(reference, classes),
    )
    assert vars(model) | {"loss_chunk_size": None} == vars(papers) | {"loss_chunk_size": None}
    assert data == papers_data
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * devices
    assert rows == papers_training.per_device_train_batch_size * papers_training.gradient_accumulation_steps
    assert training.learning_rate == papers_training.learning_rate
    assert training.output_dir != papers_training.output_dir
    size = training.expert_parallel_size
    assert devices % size == 0 and model.num_experts % size == 0 and (size > 1) == (devices > 1)


@pytest.mark.parametrize("name", GPU)
def test_without_a_gpu_the_same_file_is_for_the_cpu(name, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    values = yaml.safe_load((CONFIGS / "gpu" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert values["bf16"] is values["tf32"] is True and "use_cpu" not in values
    *_, training = parse(f"gpu/{name}", GPU[name][1])
    assert training.bf16 and training.use_cpu and training.tf32 is None


@pytest.mark.parametrize("file", ACCELERATE, ids=[file.stem for file in ACCELERATE])
def test_accelerate_computes_in_bfloat16(file):
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["mixed_precision"] == "bf16"


def test_no_configuration_keeps_a_run_off_the_gpu():
    folders = [CONFIGS / name for name in ("", "gpu", "lm", "reproduction", "translation")]
    files = [path for folder in folders for path in folder.glob("*.yaml")]
    assert len(files) > 30
    assert not [path.name for path in files if "use_cpu" in yaml.safe_load(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("has_device", [True, False])
def test_use_cpu_beside_a_device_is_told(has_device, tmp_path, monkeypatch, caplog):
    training = tiny_arguments(tmp_path)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: has_device)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: "cuda")
    with caplog.at_level(logging.WARNING, "moe_hf"):
        check_run(None, None, None, training, {})
    assert ("leaves the cuda device idle" in caplog.text) == has_device
