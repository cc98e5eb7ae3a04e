"""Sparsely-gated mixture-of-experts LSTMs (Shazeer et al., 2017) for Transformers.

Importing the package registers its models with `AutoConfig`, `AutoModel`, `AutoModelForCausalLM`,
`AutoModelForSequenceClassification` and `AutoModelForSeq2SeqLM`.
"""

from importlib import import_module

from . import cli as _cli  # noqa: F401  (first, to handle Ctrl-C during the other imports)

# isort: split
from transformers import AutoConfig, AutoModel

from .families import FAMILIES
from .models.balanced_gating import StrictlyBalancedGate
from .models.configuration_gnmt_moe import GnmtMoeConfig
from .models.configuration_lstm_moe import LstmMoeConfig
from .models.experts import MoeExperts
from .models.factored_gradients import use_factored_gradients
from .models.gating import NoisyTopKGate, SoftmaxTopKGate
from .models.hierarchical_gating import HierarchicalGate
from .models.modeling_gnmt_moe import GnmtMoeForConditionalGeneration, GnmtMoeModel
from .models.modeling_lstm_moe import LstmMoeForCausalLM, LstmMoeForSequenceClassification, LstmMoeModel
from .models.moe import MoeBlock
from .old_names import find_old_modules
from .version import __version__

find_old_modules()
for _model_type, _family in FAMILIES.items():
    AutoConfig.register(_model_type, _family.config_class, exist_ok=True)
    AutoModel.register(_family.config_class, _family.base_class, exist_ok=True)
    for _auto_class, _model_class in _family.heads.items():
        _auto_class.register(_family.config_class, _model_class, exist_ok=True)

# Names that are imported on first access, because their libraries are slow to import.
_LAZY = {
    "AuxLossCallback": "training.callbacks",
    "FactoredAdam": "training.optimizer",
    "FactoredGradientsCallback": "training.factored_callback",
    "Translator": "translator",
    "clip_grad_norm_": "training.gradient_norm",
    "gnmt_beam_search": "generation",
    "pipeline": "translation_pipeline",
    "train_lm": "training.api",
    "train_translation": "training.api",
    "with_code": "hub",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AuxLossCallback",
    "FactoredAdam",
    "FactoredGradientsCallback",
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
    "Translator",
    "__version__",
    "clip_grad_norm_",
    "gnmt_beam_search",
    "pipeline",
    "train_lm",
    "train_translation",
    "use_factored_gradients",
    "with_code",
]
