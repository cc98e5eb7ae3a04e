"""Sparsely-gated mixture-of-experts LSTMs (Shazeer et al., 2017) for Transformers.

Importing the package registers its models with `AutoConfig`, `AutoModel`, `AutoModelForCausalLM`,
`AutoModelForSequenceClassification` and `AutoModelForSeq2SeqLM`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from .models.balanced_gating import StrictlyBalancedGate
from .models.configuration_gnmt_moe import GnmtMoeConfig
from .models.configuration_lstm_moe import LstmMoeConfig
from .models.experts import MoeExperts
from .models.gating import NoisyTopKGate, SoftmaxTopKGate
from .models.hierarchical_gating import HierarchicalGate
from .models.modeling_gnmt_moe import GnmtMoeForConditionalGeneration, GnmtMoeModel
from .models.modeling_lstm_moe import LstmMoeForCausalLM, LstmMoeForSequenceClassification, LstmMoeModel
from .models.moe import MoeBlock
from .version import __version__

AutoConfig.register("lstm_moe", LstmMoeConfig, exist_ok=True)
AutoModel.register(LstmMoeConfig, LstmMoeModel, exist_ok=True)
AutoModelForCausalLM.register(LstmMoeConfig, LstmMoeForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(LstmMoeConfig, LstmMoeForSequenceClassification, exist_ok=True)
AutoConfig.register("gnmt_moe", GnmtMoeConfig, exist_ok=True)
AutoModel.register(GnmtMoeConfig, GnmtMoeModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(GnmtMoeConfig, GnmtMoeForConditionalGeneration, exist_ok=True)


def __getattr__(name: str):
    if name == "pipeline":  # what it needs is slow to import
        from .translation_pipeline import pipeline

        return pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "GnmtMoeConfig",
    "GnmtMoeForConditionalGeneration",
    "GnmtMoeModel",
    "HierarchicalGate",
    "LstmMoeConfig",
    "LstmMoeForCausalLM",
    "LstmMoeForSequenceClassification",
    "LstmMoeModel",
    "MoeBlock",
    "MoeExperts",
    "NoisyTopKGate",
    "SoftmaxTopKGate",
    "StrictlyBalancedGate",
    "__version__",
    "pipeline",
]
