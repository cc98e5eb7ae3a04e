"""TRL's trainers on the language model: loading by path, losses, packing, and adapters by `peft_config`."""

import math
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from preferences import BalancedDPOTrainer, BalancedGRPOTrainer
from sft import BalancedSFTTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from moe_hf import LstmMoeForCausalLM, LstmMoeForSequenceClassification
from moe_hf.demo.text_corpus import generate_lines, prompt_of
from moe_hf.training.callbacks import STATISTICS, AuxLossCallback

# TRL 1.16 sets by default, and PEFT 0.21 asks for, what Transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")

LINES = list(generate_lines(4, seed=5))


def trained(trainer_class, source, folder, **options):
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.padding_side = "right"
    arguments = SFTConfig(
        str(folder), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
        learning_rate=1e-2, save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(source)
    dataset = Dataset.from_dict({"text": [f"{line} {tokenizer.eos_token}" for line in LINES]})
    trainer = trainer_class(model, arguments, train_dataset=dataset, processing_class=tokenizer, **options)
    AuxLossCallback().attach_to(trainer)
    trainer.train()
    return trainer, next(log for log in trainer.state.log_history if "loss" in log)


def losses(source):
    """The mean cross-entropy of all lines with their end, and the mean balancing loss of the micro-batches of two."""
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source).eval()
    nll, count = 0.0, 0
    with torch.no_grad():
        for line in LINES:
            ids = torch.tensor([[*tokenizer(line)["input_ids"], tokenizer.eos_token_id]])
            log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
            nll -= log_probs.gather(1, ids[0, 1:, None]).sum().item()
            count += ids.shape[1] - 1
    return nll / count


@pytest.mark.parametrize("trainer_class, is_balanced", [(BalancedSFTTrainer, True), (SFTTrainer, False)])
def test_the_loss_that_is_trained(trainer_class, is_balanced, folders, tmp_path):
    _, log = trained(trainer_class, folders["saved"], tmp_path)
    balancing = log["layers.1/importance_loss"] + log["layers.1/load_loss"]
    assert all(f"layers.1/{name}" in log for name in STATISTICS) and balancing > 0.05
    task = losses(folders["saved"])
    # Training weights the balancing losses by each micro-batch's share of the tokens; the log shows their plain mean.
    assert log["loss"] == pytest.approx(task + balancing * is_balanced, abs=0.2 * balancing)


def test_adapters_on_the_experts_are_trained(folders, tmp_path):
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_parameters=["experts.up_proj", "experts.down_proj"], target_modules=[]
    )
    trainer, _ = trained(BalancedSFTTrainer, folders["saved"], tmp_path, peft_config=lora)
    trained_names = {name for name, param in trainer.model.named_parameters() if param.requires_grad}
    assert len(trained_names) == 4 and all("experts" in name for name in trained_names)
    assert all(param.abs().max() > 0 for name, param in trainer.model.named_parameters() if name in trained_names)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").exists()


def arguments(config_class, folder, **options):
    common = {
        "max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    return config_class(str(folder), **(common | options))


def first_log(trainer) -> dict:
    trainer.train()
    return next(log for log in trainer.state.log_history if "loss" in log)


PREFERENCES = Dataset.from_list(
    [
        {"prompt": prompt_of(line), "chosen": line.removeprefix(prompt_of(line)), "rejected": " zero ."}
        for line in LINES
    ]
)


def word_count(completions, **columns) -> list[float]:
    return [float(len(text.split())) for text in completions]


# name: (function from a model or its name to a trainer, its arguments class, options)
BY_PATH = {
    "SFT": (partial(SFTTrainer, train_dataset=Dataset.from_dict({"text": LINES})), SFTConfig, {}),
    "DPO": (partial(DPOTrainer, train_dataset=PREFERENCES), DPOConfig, {}),
    "GRPO": (
        partial(GRPOTrainer, reward_funcs=word_count, train_dataset=PREFERENCES.select_columns(["prompt"])),
        GRPOConfig,
        {"num_generations": 4, "max_completion_length": 5},
    ),
}


@pytest.mark.parametrize("method", BY_PATH)
def test_a_model_is_named_by_its_path(method, folders, tmp_path):
    make_trainer, config_class, options = BY_PATH[method]
    path = str(folders["saved"])
    by_path = make_trainer(model=path, args=arguments(config_class, tmp_path, **options))
    log = first_log(by_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    by_object = make_trainer(
        model=model, args=arguments(config_class, tmp_path, **options), processing_class=tokenizer
    )
    expected = first_log(by_object)
    assert isinstance(by_path.model, LstmMoeForCausalLM)
    assert log["loss"] == expected["loss"] and log["grad_norm"] == expected["grad_norm"] > 0
    by_path.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved.lm_head.weight, by_path.model.lm_head.weight)


def test_the_first_loss_of_dpo_is_log_2_without_gating_noise_and_not_with_it(folders, tmp_path):
    AutoModelForCausalLM.from_pretrained(folders["saved"], gating="noisy_top_k").save_pretrained(tmp_path / "noisy")
    AutoTokenizer.from_pretrained(folders["saved"]).save_pretrained(tmp_path / "noisy")

    def loss(**options):
        args = arguments(DPOConfig, tmp_path, model_init_kwargs=options)
        return first_log(DPOTrainer(str(tmp_path / "noisy"), args=args, train_dataset=PREFERENCES))["loss"]

    assert abs(loss() - math.log(2)) > 1e-3
    assert loss(gating="softmax_top_k") == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("method", ["DPO", "GRPO"])
def test_the_balancing_losses_can_be_added(method, folders, tmp_path):
    """The gradients differ by the balancing losses' own, whatever the number of accumulation steps."""
    make_trainer, config_class, options = BY_PATH[method]
    trainer_class = {"DPO": BalancedDPOTrainer, "GRPO": BalancedGRPOTrainer}[method]
    options = options | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.0}
    options |= {"num_generations": 2} if method == "GRPO" else {}
    losses, gradients = {}, {}
    for name, cls in {"plain": make_trainer.func, "balanced": trainer_class}.items():
        trainer = cls(
            str(folders["saved"]),
            args=arguments(config_class, tmp_path, optim="sgd", **options),
            **make_trainer.keywords,
        )
        before = trainer.model.model.layers[1].gate.weight.detach().clone()
        log = first_log(trainer)
        losses[name], gradients[name] = log["loss"], before - trainer.model.model.layers[1].gate.weight.detach()
    assert log["balancing_loss"] > 0.05
    assert losses["balanced"] - losses["plain"] == pytest.approx(log["balancing_loss"], abs=2e-4)
    assert (gradients["balanced"] - gradients["plain"]).abs().max() > 1e-4  # after a step of 0.01


# Ways of packing: SFT's options, and whether rows are flattened to one. All pack, and none pads a batch.
PACKING = {
    "packing": {"packing": True, "max_length": 64},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 64},
    "padding_free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("trainer_class", [SFTTrainer, BalancedSFTTrainer])
@pytest.mark.parametrize("how", PACKING)
def test_packed_examples_have_the_loss_of_the_single_ones(how, trainer_class, folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders["saved"], importance_loss_coef=0.0, load_loss_coef=0.0)
    tokenizer = AutoTokenizer.from_pretrained(folders["saved"])
    texts = [f"{line} {tokenizer.eos_token}" for line in LINES]
    trainer = trainer_class(
        model,
        arguments(SFTConfig, tmp_path, **PACKING[how]),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and (batch["position_ids"] == 0).sum() == len(LINES)
    log = first_log(trainer)
    assert log["loss"] == pytest.approx(losses(folders["saved"]), abs=1e-4)


def test_a_reward_model_is_trained_by_path(folders, tmp_path):
    trainer = RewardTrainer(
        str(folders["saved"]), args=arguments(RewardConfig, tmp_path, center_rewards_coefficient=None),
        train_dataset=PREFERENCES,
    )  # fmt: skip
    log = first_log(trainer)
    assert isinstance(trainer.model, LstmMoeForSequenceClassification) and trainer.model.score.weight.shape[0] == 1
    assert 0 < log["loss"] < 10 and log["grad_norm"] > 0


def test_grpo_measures_no_divergence_from_itself_without_noise(folders, tmp_path):
    make_trainer, config_class, options = BY_PATH["GRPO"]
    args = arguments(config_class, tmp_path, beta=0.1, **options)  # the model has neither noise nor dropout
    assert first_log(make_trainer(str(folders["saved"]), args=args))["kl"] == 0
