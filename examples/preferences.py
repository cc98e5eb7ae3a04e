#!/usr/bin/env python3
"""Train a language model with TRL's DPOTrainer or GRPOTrainer and its balancing losses; offline, about a minute.

    python examples/preferences.py dpo|grpo MODEL OUTPUT_DIR

MODEL is a folder with a model of `moe-hf train-lm` or `make demo`. The script can check each answer, because the
sentences are the demo's. DPO prefers the right answer to the answer of another sentence. GRPO rewards right sentences.
"""

import random
import sys

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

import moe_hf  # noqa: F401, registers the models
from moe_hf.demo.text_corpus import generate_lines, is_correct, prompt_of

COMMON = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}


class BalancingLosses:
    """A mixin for TRL's trainers that adds the policy's balancing losses to the loss.

    TRL computes the loss from the last hidden states, without the balancing losses. Only forward passes with gradients
    count, which leaves out the reference model and passes that only compute log-probabilities.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._aux_losses = []
        for module in self.model.modules():
            if isinstance(module, moe_hf.LstmMoeModel):
                module.register_forward_hook(self._keep)

    def _keep(self, module, args, outputs):
        if module.training and torch.is_grad_enabled():
            self._aux_losses.append(outputs.aux_loss)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._aux_losses.clear()
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._aux_losses:
            return result
        balancing = torch.stack(self._aux_losses).mean()
        self._metrics["train"]["balancing_loss"].append(balancing.item())
        if self.loss_is_scaled_for_ga:  # GRPO divides its loss by the accumulation steps; for DPO, the Trainer does
            balancing = balancing / self.current_gradient_accumulation_steps
        return (result[0] + balancing, result[1]) if return_outputs else result + balancing


class BalancedDPOTrainer(BalancingLosses, DPOTrainer):
    """`DPOTrainer` with the balancing losses."""


class BalancedGRPOTrainer(BalancingLosses, GRPOTrainer):
    """`GRPOTrainer` with the balancing losses."""


def main(method: str, source: str, output_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    lines = [line for line in generate_lines(2000, seed=3) if is_correct(line) is not None]
    rows = [{"prompt": prompt_of(line), "chosen": line.removeprefix(prompt_of(line))} for line in lines]
    if method == "dpo":
        # Without gating noise, because the reference model runs without noise and would differ by it.
        init = {"gating": "softmax_top_k"}
        arguments = DPOConfig(
            output_dir, max_steps=40, per_device_train_batch_size=32, learning_rate=1e-4, logging_steps=10,
            model_init_kwargs=init, **COMMON,
        )  # fmt: skip
        wrong = random.Random(0)
        rows = [row | {"rejected": wrong.choice(rows)["chosen"]} for row in rows]
        rows = [row for row in rows if row["rejected"] != row["chosen"]]
        trainer = BalancedDPOTrainer(source, args=arguments, train_dataset=Dataset.from_list(rows))
    else:
        arguments = GRPOConfig(
            output_dir, max_steps=40, per_device_train_batch_size=64, num_generations=8, learning_rate=1e-4,
            max_completion_length=16, logging_steps=10, **COMMON,
        )  # fmt: skip
        prompts = Dataset.from_list(rows).select_columns(["prompt"])
        trainer = BalancedGRPOTrainer(source, reward_funcs=right_answers, args=arguments, train_dataset=prompts)
    print(f"right answers before: {share_of_right_answers(trainer.model, tokenizer):.0%}")
    trainer.train()
    print(f"right answers after: {share_of_right_answers(trainer.model, tokenizer):.0%}")
    trainer.save_model()


def right_answers(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """Return the rewards: 1 for a right sentence, else 0."""
    return [float(is_correct(" ".join(f"{p} {c}".split())) is True) for p, c in zip(prompts, completions)]


@torch.no_grad()
def share_of_right_answers(model, tokenizer) -> float:
    prompts = [prompt_of(line) for line in generate_lines(500, seed=4) if is_correct(line) is not None]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    tokens = model.eval().generate(**inputs, max_new_tokens=16)[:, inputs["input_ids"].shape[1] :]
    rewards = right_answers(prompts, tokenizer.batch_decode(tokens, skip_special_tokens=True))
    return sum(rewards) / len(rewards)


if __name__ == "__main__":
    main(*sys.argv[1:])
