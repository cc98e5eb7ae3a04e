"""Shared by the tests of other libraries: a tiny language model with its tokenizer, saved and exported."""

import sys
from pathlib import Path

import pytest
import torch

from moe_hf import LstmMoeConfig, LstmMoeForCausalLM
from moe_hf.data.tokenizers import train_tokenizer
from moe_hf.demo.text_corpus import generate_lines
from moe_hf.hub import export

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Returns two folders: "saved" needs `import moe_hf`, "exported" contains the model code."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(generate_lines(300, seed=0), kind="word", vocab_size=300)
    config = LstmMoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        dropout=0.0,
        gating="softmax_top_k",  # without noise, so that a training step can be compared
        importance_loss_coef=0.7,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = LstmMoeForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=1.0 if "gate" in name else 0.4)
    model.save_pretrained(folder / "saved")
    tokenizer.save_pretrained(folder / "saved")
    export(str(folder / "saved"), folder / "exported")
    return {"saved": folder / "saved", "exported": folder / "exported"}
