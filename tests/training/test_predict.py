"""`predict` of the library's Trainers returns logits or translations, and nothing else."""

import numpy as np
import pytest
import torch
from tiny_models import GNMT, LM, assert_same, tiny_gnmt
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

TEXTS = [[3, 9, 4, 11], [8, 6, 10, 3], [5, 7, 3, 9], [12, 4, 8, 6], [9, 9, 3, 4]]


def rows():
    labels = [text[::-1] for text in TEXTS]
    return [{"input_ids": text, "labels": target} for text, target in zip(TEXTS, labels)]


@pytest.mark.parametrize("models", [LM, GNMT], ids=["lm", "gnmt"])
@pytest.mark.parametrize("output_router_logits", [False, True])
def test_predictions_are_the_logits_alone(models, output_router_logits, tmp_path):
    model = models.model(torch.float32, output_router_logits=output_router_logits)
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", per_device_eval_batch_size=2)
    predictions = Trainer(model, arguments).predict(rows()).predictions
    assert isinstance(predictions, np.ndarray)
    batch = {name: torch.tensor([row[name] for row in rows()]) for name in ("input_ids", "labels")}
    assert_same(torch.tensor(predictions), model(**batch).logits.detach(), 1e-5, 1e-5)


@pytest.mark.parametrize("loss_only", [False, True])
def test_translations_of_the_seq2seq_trainer_are_those_of_generate(loss_only, tmp_path):
    model = tiny_gnmt(torch.float32)
    arguments = Seq2SeqTrainingArguments(
        tmp_path, use_cpu=True, report_to="none", per_device_eval_batch_size=2, predict_with_generate=not loss_only
    )
    predictions = Seq2SeqTrainer(model, arguments).predict(rows(), max_length=9).predictions
    assert isinstance(predictions, np.ndarray)
    if not loss_only:
        expected = model.generate(torch.tensor(TEXTS), max_length=9)
        assert np.array_equal(predictions[:, : expected.shape[1]], expected)
