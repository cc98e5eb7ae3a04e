"""GNMT's beam search against the best of all outputs, each scored separately, on a tiny vocabulary."""

import itertools
import math

import pytest
import torch
from tiny_models import END, assert_same, padded, sentences, tiny_gnmt
from transformers import GenerationConfig

from moe_hf.generation import coverage_penalty, gnmt_beam_search, length_penalty

VOCAB, LONGEST = 5, 4
EVERYTHING = VOCAB**LONGEST
WEIGHTS = [(0.0, 0.0), (0.7, 0.0), (0.0, 0.4), (0.6, 0.3), (2.0, 0.1)]


def model_and_batch(seed=5, std=0.7):
    model = tiny_gnmt(vocab_size=VOCAB, seed=seed, std=std)
    model.lm_head.weight.data *= 0.3  # many outputs of about the same probability
    ids, mask = padded(sentences(4, 1, 3, vocab_size=VOCAB), 5, "left", value=4)
    return model, ids, mask


def search(model, ids, mask, num_beams=EVERYTHING, **kwargs):
    settings = {"max_new_tokens": LONGEST, "do_sample": False, "return_dict_in_generate": True, "num_beams": num_beams}
    return model.generate(ids, attention_mask=mask, custom_generate=gnmt_beam_search, **(settings | kwargs))


def all_outputs():
    """Every output of at most `LONGEST` tokens that ends with END or is as long as allowed."""
    others = [token for token in range(VOCAB) if token != END]
    outputs = [list(t) + [END] for n in range(LONGEST) for t in itertools.product(others, repeat=n)]
    return outputs + [list(t) for t in itertools.product(others, repeat=LONGEST)]


def exhaustive(model, source, alpha, beta):
    """[(score, output)], best first: one forward for each length, the score as GNMT writes it."""
    ranked = []
    for length, outputs in itertools.groupby(sorted(all_outputs(), key=len), key=len):
        outputs = torch.tensor(list(outputs))
        start = torch.full_like(outputs[:, :1], model.config.decoder_start_token_id)
        result = model(
            input_ids=source.expand(len(outputs), -1),
            decoder_input_ids=torch.cat([start, outputs[:, :-1]], dim=1),
            output_attentions=True,
        )
        log_probs = result.logits.log_softmax(-1).gather(2, outputs[..., None]).sum(dim=(1, 2)).tolist()
        attention = result.cross_attentions[0][:, 0].tolist()
        for output, log_prob, rows in zip(outputs.tolist(), log_probs, attention):
            penalty = sum(math.log(min(sum(column), 1.0)) for column in zip(*rows))
            ranked.append((log_prob / ((5 + length) / 6) ** alpha + beta * penalty, output))
    return sorted(ranked, reverse=True)


def as_lists(sequences):
    """Returns sequences as lists, without the start token and without tokens after the end."""
    rows = [row[1:] for row in sequences.tolist()]
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


@pytest.mark.parametrize(("alpha", "beta"), WEIGHTS)
@pytest.mark.parametrize(("seed", "std"), [(5, 0.7), (3, 1.4)])
def test_a_beam_of_everything_finds_the_best_outputs_with_their_scores(alpha, beta, seed, std):
    model, ids, mask = model_and_batch(seed, std)
    found = search(model, ids, mask, num_return_sequences=6, length_alpha=alpha, coverage_beta=beta)
    rows = as_lists(found.sequences)
    for b in range(3):
        best = exhaustive(model, ids[b, mask[b].bool()][None], alpha, beta)[:6]
        assert rows[6 * b : 6 * b + 6] == [output for _, output in best]
        assert_same(found.sequences_scores[6 * b : 6 * b + 6].tolist(), [score for score, _ in best], 1e-5, 1e-6)


def test_weights_change_what_is_found_and_beams_end_at_different_lengths():
    model, ids, mask = model_and_batch()
    found = [as_lists(search(model, ids, mask, length_alpha=a, coverage_beta=b).sequences) for a, b in WEIGHTS]
    assert len({str(rows) for rows in found}) >= 3
    assert len({len(row) for rows in found for row in rows}) >= 3


@pytest.mark.parametrize("num_beams", [1, 2, 4])
def test_the_batch_the_padding_and_the_cache_change_nothing(num_beams):
    model, ids, mask = model_and_batch()
    options = {"num_beams": num_beams, "num_return_sequences": num_beams}
    together = search(model, ids, mask, **options)
    uncached = search(model, ids, mask, use_cache=False, **options)
    assert torch.equal(together.sequences, uncached.sequences)
    assert_same(together.sequences_scores, uncached.sequences_scores)
    for b in range(3):
        alone = search(model, ids[b, mask[b].bool()][None], None, **options)
        rows = slice(num_beams * b, num_beams * (b + 1))
        assert as_lists(together.sequences[rows]) == as_lists(alone.sequences)
        assert_same(together.sequences_scores[rows], alone.sequences_scores)


def test_without_weights_and_with_early_stopping_off_it_is_the_librarys_search_without_length_penalty():
    model = tiny_gnmt(std=0.5)
    ids, mask = padded(sentences(4, 2, 6), 6)
    for num_beams in (2, 5):
        options = {"num_beams": num_beams, "max_new_tokens": 8, "num_return_sequences": 2}
        ours = search(model, ids, mask, length_alpha=0.0, coverage_beta=0.0, **options)
        theirs = model.generate(
            ids, attention_mask=mask, length_penalty=0.0, early_stopping="never", do_sample=False, **options
        )
        assert as_lists(ours.sequences) == as_lists(theirs)


def test_one_beam_is_greedy_search_and_a_plain_call_returns_the_sequences_alone():
    model = tiny_gnmt(std=0.5)
    ids, mask = padded(sentences(4, 2, 6), 6)
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    ours = search(model, ids, mask, num_beams=1, max_new_tokens=8, return_dict_in_generate=False)
    assert torch.equal(ours, greedy)


def test_an_end_that_is_not_among_the_best_candidates_does_not_finish():
    seconds = 0
    for seed in range(4):
        model, ids, mask = model_and_batch(seed)
        model.lm_head.weight.data[END] = 0.9 * model.lm_head.weight[4]  # often the second best
        greedy = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, output_logits=True, return_dict_in_generate=True
        )
        second = [(step.topk(2).indices[:, 1] == END).any() for step in greedy.logits]
        seconds += sum(second)
        ours = search(model, ids, mask, num_beams=1, max_new_tokens=6, length_alpha=0.0, coverage_beta=0.0)
        assert as_lists(ours.sequences) == as_lists(greedy.sequences)
    assert seconds > 3


def test_the_scores_are_those_of_the_returned_tokens_and_beams_can_be_followed():
    model, ids, mask = model_and_batch()
    found = search(
        model,
        ids,
        mask,
        num_beams=3,
        num_return_sequences=2,
        output_attentions=True,
        length_alpha=0.5,
        coverage_beta=0.4,
    )
    for row, tokens in enumerate(as_lists(found.sequences)):
        beams = found.beam_indices[row, : len(tokens)].tolist()
        assert all(3 * (row // 2) <= beam < 3 * (row // 2) + 3 for beam in beams)
        assert found.beam_indices[row, len(tokens) :].eq(-1).all()
        source = ids[row // 2, mask[row // 2].bool()][None]
        score = next(score for score, output in exhaustive(model, source, 0.5, 0.4) if output == tokens)
        assert found.sequences_scores[row].item() == pytest.approx(score, rel=1e-5)
    assert all(step[0].shape == (9, 1, 1, 5) for step in found.cross_attentions)


def log_probs_by_teacher_forcing(model, source, tokens):
    """(length,) in float64: one forward over the finished output, without any search or cache."""
    logits = model(input_ids=source, decoder_input_ids=tokens[None, :-1]).logits[0]
    return logits.double().log_softmax(-1).gather(1, tokens[1:, None])[:, 0]


@pytest.mark.parametrize("use_cache", [True, False])
def test_transition_scores_are_the_log_probabilities_of_the_chosen_tokens(use_cache):
    model = tiny_gnmt(std=0.6)
    model.lm_head.weight.data *= 0.4  # so that beams cross
    ids, mask = padded(sentences(4, 2, 5), 6, "left")
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 7, "use_cache": use_cache}
    found = search(
        model, ids, mask, length_alpha=0.0, coverage_beta=0.0, output_scores=True, output_logits=True, **options
    )
    assert any(row[1:] != row[:1] * (len(row) - 1) for row in found.beam_indices.tolist())
    for records, normalize in ((found.scores, False), (found.logits, True)):
        chosen = model.compute_transition_scores(found.sequences, records, found.beam_indices, normalize)
        for row, output in enumerate(as_lists(found.sequences)):
            tokens = torch.tensor([model.config.decoder_start_token_id, *output])
            expected = log_probs_by_teacher_forcing(model, ids[row // 3, mask[row // 3].bool()][None], tokens)
            assert_same(chosen[row, : len(output)].double(), expected, 1e-6, 1e-6)
            assert chosen[row, len(output) :].eq(0).all()
            assert found.sequences_scores[row].item() == pytest.approx(expected.sum().item(), rel=1e-5)


def test_what_is_recorded_has_the_form_of_the_librarys_beam_search():
    model, ids, mask = model_and_batch()
    asked = {f"output_{name}": True for name in ("scores", "logits", "attentions", "hidden_states")}
    options = {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": None}  # all outputs are of one length
    theirs = model.generate(
        ids, attention_mask=mask, max_new_tokens=LONGEST, return_dict_in_generate=True, **asked, **options
    )
    ours = search(model, ids, mask, **asked, **options)

    def form(value):
        if isinstance(value, tuple):
            return [form(one) for one in value]
        return tuple(value.shape) if torch.is_tensor(value) else type(value)

    assert {name: form(value) for name, value in ours.items()} == {name: form(theirs[name]) for name in theirs}
    assert_same(ours.encoder_hidden_states, theirs.encoder_hidden_states)
    assert_same(ours.logits[0], theirs.logits[0].double(), 1e-6, 1e-6)
    assert [len(ours[name]) for name in ("scores", "logits", "decoder_hidden_states", "cross_attentions")] == [4] * 4
    plain = search(model, ids, mask, **options)
    assert not {"scores", "logits", "decoder_hidden_states", "encoder_hidden_states", "cross_attentions"} & set(plain)


def test_early_stopping_ends_with_the_first_full_beam():
    model, ids, mask = model_and_batch()
    model.lm_head.weight.data *= 0.3
    model.lm_head.weight.data[END] = model.lm_head.weight[4]  # so that ends are often among the best
    calls, counts = [], {}
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    for early in (True, False):
        calls.clear()
        search(model, ids, mask, num_beams=3, early_stopping=early, max_new_tokens=20, length_alpha=1.0)
        counts[early] = len(calls)
    assert counts[True] < counts[False] < 20


def test_the_penalties_are_gnmts():
    assert length_penalty(1, 0.3) == 1 and length_penalty(7, 1.0) == 2 and length_penalty(7, 0.0) == 1
    coverage, mask = torch.tensor([[0.5, 2.0, 0.1], [1.0, 1.0, 0.0]]), torch.tensor([[True, True, False]] * 2)
    assert_same(coverage_penalty(coverage, mask, 2.0), torch.tensor([2 * math.log(0.5), 0.0]))
    assert coverage_penalty(torch.zeros(1), torch.tensor([True]), 1.0).isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length_alpha": -0.1}, "length_alpha=-0.1 must not be negative"),
        ({"coverage_beta": -1}, "coverage_beta=-1"),
        ({"do_sample": True}, "do_sample=True"),
    ],
)
def test_what_cannot_be_searched_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        search(*model_and_batch(), num_beams=2, **options)


def test_settings_may_come_from_a_generation_config():
    model, ids, mask = model_and_batch()
    config = GenerationConfig(
        num_beams=3, max_new_tokens=4, eos_token_id=END, pad_token_id=0, decoder_start_token_id=1
    )
    expected = search(model, ids, mask, num_beams=3).sequences
    assert torch.equal(
        model.generate(ids, attention_mask=mask, generation_config=config, custom_generate=gnmt_beam_search), expected
    )
