#!/usr/bin/env python3
"""Teach a small language model one more dialect with LoRA adapters (PEFT) on its experts; offline, about a minute.

    python examples/lora_experts.py [FOLDER]

The text is the demo's, with sentences in six dialects. The model learns five dialects, and its adapters the sixth.
"""

import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from moe_hf import LstmMoeConfig, LstmMoeForCausalLM
from moe_hf.data.tokenizers import train_tokenizer
from moe_hf.demo.text_corpus import dialect_of, generate_lines
from moe_hf.training.callbacks import AuxLossCallback

NEW_DIALECT = "clock"


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/lora-experts")
    set_seed(0)
    lines = list(dict.fromkeys(generate_lines(6000, seed=0)))
    new = [line for line in lines if dialect_of(line) == NEW_DIALECT]
    known = [line for line in lines if dialect_of(line) != NEW_DIALECT]
    tokenizer = train_tokenizer(lines, kind="word", vocab_size=1000)
    tokenizer.padding_side = "right"  # with left padding, the Trainer counts the first token as predicted

    def examples(lines: list[str]) -> list[dict]:
        ids = [[tokenizer.eos_token_id, *tokenizer(line)["input_ids"], tokenizer.eos_token_id] for line in lines]
        return [{"input_ids": row, "labels": row} for row in ids]

    def train(model, lines: list[str], max_steps: int, learning_rate: float) -> None:
        arguments = TrainingArguments(
            str(folder / "checkpoints"),
            max_steps=max_steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=64,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        collator = DataCollatorForSeq2Seq(tokenizer)  # sets labels at padding to -100
        trainer = Trainer(model, arguments, collator, train_dataset=examples(lines))
        AuxLossCallback().attach_to(trainer)
        trainer.train()

    @torch.no_grad()
    def report(when: str, model) -> None:
        """Print the perplexity per word on held-out sentences."""
        batches = [DataCollatorForSeq2Seq(tokenizer)(examples(part[-200:])) for part in (known, new)]
        losses = [model.eval()(**batch).loss for batch in batches]
        print(f"{when}: perplexity {losses[0].exp():.2f} of five dialects, {losses[1].exp():.2f} of the new one")

    config = LstmMoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=128,
        dropout=0.0, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LstmMoeForCausalLM(config)
    train(model, known[:-200], max_steps=250, learning_rate=6e-3)
    model.save_pretrained(folder / "model")
    report("before", model)

    # up_proj and down_proj have the shape (experts, ...), and each expert gets separate matrices of rank 4.
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_parameters=["experts.up_proj", "experts.down_proj", "gate.weight"],
        target_modules=["embed_tokens", "lm_head"],
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), lora)
    adapted.print_trainable_parameters()
    train(adapted, new[:-200] + known[:1000], max_steps=150, learning_rate=1e-2)
    report("after", adapted)

    # Saves the embedding's adapter instead of all its weights.
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").merge_and_unload().save_pretrained(folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    report("merged", merged)
    ids = torch.tensor([examples(new[-1:])[0]["input_ids"]])
    with torch.no_grad():
        difference = (merged.eval()(ids).logits - adapted.eval()(ids).logits).abs().max()
    print(f"largest difference of a logit, merged and not: {difference:.1e}")
    print(f"adapter: {(folder / 'adapter' / 'adapter_model.safetensors').stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
