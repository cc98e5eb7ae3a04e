"""Tiny streams, models and trainers for the tests of training."""

import numpy as np
import torch

from moe_hf import LstmMoeConfig, LstmMoeForCausalLM
from moe_hf.data.windows import collate_windows
from moe_hf.training.arguments import MoeTrainingArguments
from moe_hf.training.lm_trainer import LmTrainer

VOCAB_SIZE = 23


class ArrayStream:
    """Random tokens with the interface of `TokenStream`."""

    def __init__(self, num_tokens: int, num_words: int = 1, seed: int = 0):
        self.tokens = np.random.default_rng(seed).integers(0, VOCAB_SIZE, num_tokens)
        self.num_words = num_words

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, key):
        return self.tokens[key]


def noiseless_lm(dtype=torch.float64, seed: int = 0, **config) -> LstmMoeForCausalLM:
    """A model by default without noise, dropout and balancing; its gates are not zero."""
    values = dict(vocab_size=VOCAB_SIZE, hidden_size=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    values |= dict(dropout=0.0, gating="softmax_top_k", importance_loss_coef=0.0, load_loss_coef=0.0)
    config = LstmMoeConfig(**(values | config))
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = LstmMoeForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name:
                weight.normal_()
    return model.to(dtype)


def tiny_arguments(output_dir, **arguments) -> MoeTrainingArguments:
    values = dict(output_dir=str(output_dir), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
    values |= dict(optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1)
    return MoeTrainingArguments(**(values | dict(train_sampling_strategy="sequential") | arguments))


def tiny_trainer(
    model, train_dataset, output_dir, *, carry_state=False, callbacks=None, eval_dataset=None, **arguments
):
    return LmTrainer(
        model=model,
        args=tiny_arguments(output_dir, **arguments),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collate_windows,
        callbacks=callbacks,
        carry_state=carry_state,
    )


def losses_of(trainer) -> list[float]:
    """Returns the logged training losses."""
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def assert_same_weights(model, expected) -> None:
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(
            model.state_dict()[name], weight, rtol=1e-5, atol=1e-7, msg=lambda m: f"{name}: {m}"
        )


def assert_same_bits(actual, expected, where="state"):
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_same_bits(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for i, pair in enumerate(zip(actual, expected)):
            assert_same_bits(*pair, f"{where}.{i}")
    elif isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected), where
    else:
        assert actual == expected, where
