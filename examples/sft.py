#!/usr/bin/env python3
"""Fine-tune a language model with TRL's SFTTrainer and its balancing losses; offline, on generated sentences.

    python examples/sft.py MODEL OUTPUT_DIR

MODEL is a folder or Hub name of a model, such as a model of `moe-hf train-lm` or `make demo`.
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import SFTConfig, SFTTrainer

import moe_hf  # noqa: F401, registers the models
from moe_hf.demo.text_corpus import generate_lines, prompt_of
from moe_hf.training.callbacks import AuxLossCallback


class BalancedSFTTrainer(SFTTrainer):
    """`SFTTrainer` with the loss that the model computes.

    TRL 1.16 computes the loss from the last hidden states, without the importance and load losses. With
    `router_aux_loss_coef`, TRL adds Mixtral's loss instead.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def main(source: str, output_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.padding_side = "right"
    lines = list(generate_lines(2000, seed=3))
    # TRL appends the end symbol without a space. A word tokenizer would read ".<eos>" as one unknown word.
    end = f" {tokenizer.eos_token}"
    rows = [{"prompt": prompt_of(line), "completion": line.removeprefix(prompt_of(line)) + end} for line in lines]
    arguments = SFTConfig(
        output_dir,
        max_steps=20,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        completion_only_loss=True,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    model = AutoModelForCausalLM.from_pretrained(source)
    trainer = BalancedSFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    AuxLossCallback().attach_to(trainer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
