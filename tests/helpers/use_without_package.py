"""Uses a Hub repository without the package, as a user would: loads, generates, fine-tunes and saves.

python use_without_package.py AUTO_CLASS REPOSITORY WORK_FOLDER [AUTO_CLASS REPOSITORY WORK_FOLDER ...]

WORK_FOLDER/expected.pt contains inputs and their logits.
"""

import sys
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

sys.modules["moe_hf"] = None  # so that importing it fails


def use(auto_class, repository: str, folder: Path) -> None:
    inputs, expected = torch.load(folder / "expected.pt")

    tokenizer = AutoTokenizer.from_pretrained(repository, trust_remote_code=True)
    model = auto_class.from_pretrained(repository, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert AutoConfig.from_pretrained(repository, trust_remote_code=True).model_type == model.config.model_type
    base = AutoModel.from_pretrained(repository, trust_remote_code=True)
    torch.testing.assert_close(base.state_dict(), model.base_model.state_dict())

    if auto_class is AutoModelForCausalLM:
        classifier = AutoModelForSequenceClassification.from_pretrained(
            repository, trust_remote_code=True, num_labels=3
        )
        assert type(classifier).__module__.startswith("transformers_modules.")
        torch.testing.assert_close(classifier.base_model.state_dict(), model.base_model.state_dict())
        state = classifier.base_model(**inputs).last_hidden_state[:, -1]
        torch.testing.assert_close(classifier(**inputs).logits, state @ classifier.score.weight.T)

    prompt = tokenizer("the", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=5, num_beams=2)
    assert isinstance(tokenizer.decode(generated[0], skip_special_tokens=True), str)

    rows = [{name: ids[0] for name, ids in inputs.items() if name == "input_ids"}] * 4
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    options = {"max_steps": 2, "learning_rate": 0.1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder / "trainer"), save_strategy="no", **options),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    logits = model.eval()(**inputs).logits
    assert not torch.allclose(logits, expected, atol=1e-3), "the training changed nothing"

    trainer.save_model(str(folder / "saved"))
    again = auto_class.from_pretrained(folder / "saved", trust_remote_code=True)
    torch.testing.assert_close(again(**inputs).logits, logits)
    print("works without the package")


for name, repository, folder in zip(*[iter(sys.argv[1:])] * 3, strict=True):
    use(getattr(transformers, name), repository, Path(folder))
