"""The two families of models: their types, classes, Auto classes and tasks, defined once."""

from typing import NamedTuple

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from .models.configuration_gnmt_moe import GnmtMoeConfig
from .models.configuration_lstm_moe import LstmMoeConfig
from .models.configuration_moe import MoeConfig
from .models.modeling_gnmt_moe import GnmtMoeForConditionalGeneration, GnmtMoeModel
from .models.modeling_lstm_moe import LstmMoeForCausalLM, LstmMoeForSequenceClassification, LstmMoeModel
from .models.pretrained_moe import MoePreTrainedModel


class Family(NamedTuple):
    """A family of models.

    Attributes:
        config_class: the configuration class, whose `model_type` names the family.
        base_class: the model without a head.
        model_class: the model with its softmax, which trainings create and commands load.
        auto_class: the Auto class that loads `model_class`.
        task: the task of `model_class`, by the Hub's name for it.
        other_heads: further models on `base_class`, by the Auto class that loads them.
    """

    config_class: type[MoeConfig]
    base_class: type[MoePreTrainedModel]
    model_class: type[MoePreTrainedModel]
    auto_class: type
    task: str
    other_heads: dict[type, type[MoePreTrainedModel]] = {}

    @property
    def heads(self) -> dict[type, type[MoePreTrainedModel]]:
        """Every model with a head, by the Auto class that loads it."""
        return {self.auto_class: self.model_class, **self.other_heads}

    @property
    def auto_map(self) -> dict[str, str]:
        """Return `auto_map` of config.json in a folder with code: the file and class that each Auto class loads."""
        classes = {"AutoConfig": self.config_class, "AutoModel": self.base_class}
        classes |= {auto_class.__name__: model_class for auto_class, model_class in self.heads.items()}
        return {name: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for name, cls in classes.items()}


LANGUAGE_MODELS = Family(
    config_class=LstmMoeConfig,
    base_class=LstmMoeModel,
    model_class=LstmMoeForCausalLM,
    auto_class=AutoModelForCausalLM,
    task="text-generation",
    other_heads={AutoModelForSequenceClassification: LstmMoeForSequenceClassification},
)
TRANSLATION_MODELS = Family(
    config_class=GnmtMoeConfig,
    base_class=GnmtMoeModel,
    model_class=GnmtMoeForConditionalGeneration,
    auto_class=AutoModelForSeq2SeqLM,
    task="translation",
)
# {model type: family}.
FAMILIES = {family.config_class.model_type: family for family in (LANGUAGE_MODELS, TRANSLATION_MODELS)}
