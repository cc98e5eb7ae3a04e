"""Batches by token count: budget, epochs, several processes, directions by temperature, and the Trainer."""

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from moe_hf.data.token_batches import TokenBatchSampler, direction_shares
from moe_hf.data.translation_tokenizers import train_translation_tokenizer
from moe_hf.errors import InputError
from moe_hf.training.token_batch_trainer import TokenBatchTrainerMixin

LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=3, max_size=60)


def sampler(pairs, budget=50, **options):
    return TokenBatchSampler(*zip(*pairs), budget, **options)


def random_pairs(count, seed=0):
    lengths = np.random.default_rng(seed).integers(1, 30, (count, 2))
    return [tuple(pair) for pair in lengths.tolist()]


@settings(deadline=None, max_examples=50)
@given(pairs=LENGTHS, budget=st.integers(90, 200), width=st.integers(1, 6), processes=st.integers(1, 3))
def test_every_pair_comes_once_an_epoch_within_the_budget(pairs, budget, width, processes):
    batches = sampler(pairs, budget, bucket_width=width, num_processes=processes)
    for epoch in range(3):
        batches.set_epoch(epoch)
        drawn = list(batches)
        assert len(drawn) == len(batches) and len(drawn) % processes == 0
        assert sorted(row for batch in drawn for row in batch) == list(range(len(pairs)))
        for batch in drawn:
            assert len(batch) * max(max(pairs[row]) for row in batch) <= budget


def test_a_pair_longer_than_the_budget_is_a_batch_of_its_own():
    drawn = list(sampler([(3, 2), (70, 1), (2, 3), (1, 51)], 50))
    assert sorted(map(sorted, drawn)) == [[0, 2], [1], [3]]


def test_pairs_of_a_batch_are_similarly_long():
    pairs = random_pairs(2000)
    drawn = list(sampler(pairs, 300))
    longest = np.max(pairs, axis=1)
    assert sum(len(batch) * longest[batch].max() for batch in drawn) < 1.02 * longest.sum()


def test_epochs_and_seeds_differ_and_repeat():
    pairs = random_pairs(300)
    batches = sampler(pairs, seed=1)
    first = list(batches)
    assert list(batches) == first
    batches.set_epoch(1)
    second = list(batches)
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    assert list(sampler(pairs, seed=2)) != first
    again = sampler(pairs, seed=1)
    again.set_epoch(1)
    assert list(again) == second


def test_batches_are_not_in_the_order_of_their_lengths():
    pairs = random_pairs(500)
    longest = [max(pairs[batch[0]]) for batch in sampler(pairs)]
    assert longest != sorted(longest)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("skip", [0, 2])
def test_processes_share_the_batches_and_cover_all(processes, skip):
    pairs = random_pairs(200)
    batches = sampler(pairs, num_processes=processes)
    batches.set_epoch(4)
    whole = list(batches)
    shares = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    for rank, share in enumerate(shares):
        assert share == whole[rank::processes]
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(len(pairs)))
    rows = [[max(pairs[row]) for row in share[0]] for share in shares]
    assert max(map(max, rows)) - min(map(max, rows)) <= 5  # the processes of a step wait for each other


@pytest.mark.parametrize("temperature", [1, 2, 5, 1e9])
def test_shares_follow_the_temperature(temperature):
    counts = np.array([900, 90, 10])
    shares = direction_shares(counts, temperature)
    weights = counts ** (1 / temperature)
    assert shares.sum() == 1000
    assert np.abs(shares - 1000 * weights / weights.sum()).max() <= 1.5


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 10**6), min_size=1, max_size=12), temperature=st.floats(1, 100))
def test_shares_add_up_and_leave_nobody_out(counts, temperature):
    shares = direction_shares(counts, temperature)
    assert shares.sum() == sum(counts) and shares.min() >= 1
    if temperature == 1:
        assert shares.tolist() == counts


@settings(deadline=None, max_examples=50)
@given(pairs=LENGTHS, data=st.data(), temperature=st.floats(1, 10), processes=st.integers(1, 2))
def test_temperature_draws_whole_shares_and_every_pair_in_turn(pairs, data, temperature, processes):
    directions = data.draw(st.lists(st.integers(0, 2), min_size=len(pairs), max_size=len(pairs)))
    batches = sampler(pairs, 90, directions=directions, temperature=temperature, num_processes=processes)
    values, counts = np.unique(directions, return_counts=True)
    shares = dict(zip(values.tolist(), direction_shares(counts, temperature).tolist()))
    times = Counter()
    for epoch in range(len(pairs)):
        batches.set_epoch(epoch)
        drawn = list(batches)
        assert len(drawn) == len(batches)
        assert all(len(batch) * max(max(pairs[row]) for row in batch) <= 90 for batch in drawn)
        rows = [row for batch in drawn for row in batch]
        assert Counter(directions[row] for row in rows) == shares
        times.update(rows)
    assert set(times) == set(range(len(pairs)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "tokens_per_batch=0 must be at least 1"),
        ({"bucket_width": 0}, "bucket_width=0 must be at least 1"),
        ({"temperature": 0.5}, "sampling_temperature=0.5 must be at least 1"),
        ({"num_processes": 4}, "3 sentence pairs cannot be spread over 4 processes"),
        ({"budget": 1, "num_processes": 2}, "3 batches of one sentence .* 2 processes: tokens_per_batch=1 is too"),
    ],
)
def test_bad_option_is_named(options, message):
    with pytest.raises(InputError, match=message):
        sampler([(1, 2), (3, 4), (5, 6)], **options)


class Recorder(torch.nn.Module):
    """A model of one weight that records the pairs it gets: the first source token is the pair's number."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, input_ids, attention_mask, labels):
        assert attention_mask.sum() == (input_ids != 0).sum()
        self.seen.append((input_ids[:, 0] - 10).tolist())
        return {"loss": self.weight * (labels != -100).sum()}


class RecordingTrainer(TokenBatchTrainerMixin, Seq2SeqTrainer):
    pass


PAIRS = random_pairs(60)


def train(output_dir, num_processes=1, resume=None, accumulation=1):
    rows = [
        {"input_ids": [10 + i, *[5] * (s - 1)], "labels": [5] * t, "source_length": s}
        for i, (s, t) in enumerate(PAIRS)
    ]
    model = Recorder()
    tokenizer = train_translation_tokenizer(["a b"], vocab_size=300)
    arguments = Seq2SeqTrainingArguments(
        str(output_dir),
        num_train_epochs=3,
        save_steps=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_accumulation_steps=accumulation,
        dataloader_pin_memory=False,
    )
    batches = sampler(PAIRS, 100, seed=3, num_processes=num_processes)
    trainer = RecordingTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        train_batch_sampler=batches,
    )
    trainer.train(resume_from_checkpoint=resume)
    return model.seen, batches, trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_sees_every_pair_once_an_epoch_and_resumes_in_the_middle(tmp_path, accumulation):
    seen, batches, trainer = train(tmp_path, accumulation=accumulation)
    per_epoch = len(batches)
    assert len(seen) == 3 * per_epoch
    epochs = [seen[i : i + per_epoch] for i in range(0, len(seen), per_epoch)]
    for epoch, drawn in enumerate(epochs):
        batches.set_epoch(epoch)
        assert drawn == list(batches)
        assert sorted(row for batch in drawn for row in batch) == list(range(len(PAIRS)))
    steps_per_epoch = trainer.state.max_steps // 3
    in_second_epoch = next(s for s in range(5, 100, 5) if steps_per_epoch < s and s % steps_per_epoch)
    resumed, _, _ = train(tmp_path, resume=str(tmp_path / f"checkpoint-{in_second_epoch}"), accumulation=accumulation)
    epoch, step = divmod(in_second_epoch, steps_per_epoch)
    assert resumed == seen[epoch * per_epoch + step * accumulation :]


def test_two_processes_resume_in_the_epoch_they_were_in(monkeypatch, tmp_path):
    seen, batches, _ = train(tmp_path, num_processes=2)

    def prepare(self, loader):
        """Returns a loader as accelerate prepares it in process 1 of 2."""
        return DataLoader(
            loader.dataset, batch_sampler=BatchSamplerShard(loader.batch_sampler, 2, 1), collate_fn=loader.collate_fn
        )

    monkeypatch.setattr(RecordingTrainer, "get_train_dataloader", _sharded(prepare))
    share, _, trainer = train(tmp_path / "share", num_processes=2)
    batches.set_epoch(1)
    per_epoch = len(batches) // 2
    assert share[per_epoch : 2 * per_epoch] == list(batches)[1::2]
    step = next(s for s in range(5, 100, 5) if per_epoch < s < 2 * per_epoch and s % per_epoch)
    resumed, _, _ = train(tmp_path / "share", num_processes=2, resume=str(tmp_path / f"share/checkpoint-{step}"))
    assert resumed == share[step:]


def _sharded(prepare):
    original = TokenBatchTrainerMixin.get_train_dataloader

    def get_train_dataloader(self):
        self.accelerator.prepare = lambda loader: prepare(self, loader)
        loader = original(self)
        del self.accelerator.prepare
        return loader

    return get_train_dataloader
