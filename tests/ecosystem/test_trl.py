"""TRL's SFTTrainer on the language model: which loss it trains, and adapters by its `peft_config`."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from sft import BalancedSFTTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from moe_hf.training.callbacks import STATISTICS, AuxLossCallback
from moe_hf.training.demo_corpus import generate_lines

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
    # The balancing losses are weighed by each micro-batch's share of the tokens, the log has their plain mean.
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
