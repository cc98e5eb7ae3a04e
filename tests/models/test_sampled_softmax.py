"""Statistical tests of the sampler and its correction: what is unbiased, and what becomes unbiased in a large sample.

Every draw is seeded, so that a failure repeats. z is an error in standard errors. Of a thousand correct values about
one exceeds 3.3. The largest value compared here exceeds 4.5 only once in a few thousand seeds.

Shape suffixes: R draws, T tokens, D width, V vocabulary, N sampled classes.
"""

import math

import pytest
import torch

from moe_hf.models.softmax_loss import chunked_cross_entropy, log_uniform_sample, sampled_softmax_loss

pytestmark = pytest.mark.slow

VOCAB = 40
# Frequent, rare and repeated targets, so that accidental hits are common.
TARGETS = torch.tensor([0, 0, 1, 2, 5, 17, 39])
LARGER, SIZES = 400, (40, 160, 320)


def problem(vocab_size=VOCAB):
    """Hidden states and weights whose logits differ by some units, with no regard to the proposal."""
    generator = torch.Generator().manual_seed(1)
    hidden_TD = torch.randn(len(TARGETS), 3, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(vocab_size, 3, generator=generator, dtype=torch.float64)
    return hidden_TD.requires_grad_(), weight_VD.requires_grad_()


def draws(num_sampled, number, vocab_size=VOCAB, seed=0):
    torch.manual_seed(seed)
    return [log_uniform_sample(num_sampled, vocab_size) for _ in range(number)]


def z_scores(values_R, expected):
    """Of the mean over the first dimension."""
    error = values_R.std(0) / math.sqrt(len(values_R))
    return ((values_R.mean(0) - expected) / error).abs().max().item()


def test_one_sampled_class_has_the_log_uniform_distribution():
    number = 4000
    counts_V = torch.bincount(torch.cat([sample for sample, _ in draws(1, number)]), minlength=VOCAB)
    q_V = torch.tensor([(math.log(i + 2) - math.log(i + 1)) / math.log(VOCAB + 1) for i in range(VOCAB)])
    assert abs(q_V.sum() - 1) < 1e-6
    chi_square = ((counts_V - number * q_V) ** 2 / (number * q_V)).sum().item()
    assert chi_square < 39 + 4 * math.sqrt(2 * 39)  # 39 degrees of freedom


@pytest.mark.parametrize("num_sampled", [4, 20])
def test_a_class_counts_once_on_average(num_sampled):
    """The expected count is right for every class: E[1 / count, where it is in the sample] = 1."""
    corrected_RV = torch.zeros(2000, VOCAB, dtype=torch.float64)
    for row_V, (sample_N, log_count_N) in zip(corrected_RV, draws(num_sampled, 2000)):
        assert len(sample_N.unique()) == num_sampled and torch.equal(sample_N, sample_N.sort().values)
        assert log_count_N.max() <= 0
        row_V[sample_N] = (-log_count_N).exp()
    assert z_scores(corrected_RV, 1.0) < 4.5


def denominator(hidden_TD, weight_VD, token, sample):
    """Z' of one token, from its loss."""
    loss = sampled_softmax_loss(hidden_TD[token : token + 1], weight_VD, TARGETS[token : token + 1], *sample)
    return (loss + hidden_TD[token] @ weight_VD[TARGETS[token]]).exp()


@pytest.mark.parametrize("token", [0, 3, 6])
def test_the_estimated_denominator_and_its_gradient_are_unbiased(token):
    hidden_TD, weight_VD = problem()

    def value_and_gradient(denominator):
        grads = torch.autograd.grad(denominator, (hidden_TD, weight_VD))
        return torch.cat([denominator.detach()[None], *(grad.flatten() for grad in grads)])

    expected = value_and_gradient((hidden_TD[token] @ weight_VD.T).exp().sum())
    estimates_R = torch.stack(
        [value_and_gradient(denominator(hidden_TD, weight_VD, token, sample)) for sample in draws(12, 800)]
    )
    concerns_token = expected != 0  # not the other tokens' hidden states
    assert concerns_token.sum() == 1 + 3 + 3 * VOCAB
    assert (estimates_R[:, ~concerns_token]).abs().max() < 1e-10
    # Rows that are in nearly every sample, such as the target's, have almost no spread.
    varies = concerns_token & (estimates_R.std(0) > 1e-3 * expected.abs())
    assert varies.sum() > 100 and z_scores(estimates_R[:, varies], expected[varies]) < 4.5


@pytest.fixture(scope="module")
def errors_by_size():
    """Returns for each number of samples: relative error of the mean gradient over 400 draws, its standard error, and
    the error of the mean loss."""
    inputs, number = problem(LARGER), 400

    def loss_and_gradient(loss):
        return torch.cat([loss.detach()[None], *(grad.flatten() for grad in torch.autograd.grad(loss, inputs))])

    expected = loss_and_gradient(chunked_cross_entropy(*inputs, TARGETS))
    norm, errors = expected[1:].norm(), {}
    for size in SIZES:
        values_R = torch.stack(
            [
                loss_and_gradient(sampled_softmax_loss(*inputs, TARGETS, *sample))
                for sample in draws(size, number, LARGER)
            ]
        )
        standard_error = (values_R[:, 1:].var(0).sum() / number).sqrt() / norm
        error = values_R.mean(0) - expected
        errors[size] = (error[1:].norm() / norm).item(), standard_error.item(), (error[0] / expected[0]).item()
    return errors


def test_the_gradients_bias_falls_with_the_sample(errors_by_size):
    """The gradient of the loss is a quotient of unbiased estimates: biased, by about 1 / N."""
    few, more, most = (errors_by_size[size] for size in SIZES)
    assert few[0] > 5 * few[1]  # there is a bias, measured well
    assert more[0] < few[0] / 2 and most[0] < more[0] / 2
    assert most[0] < 0.02


def test_the_mean_loss_is_below_the_full_softmaxs(errors_by_size):
    few, more, most = (errors_by_size[size][2] for size in SIZES)
    assert few < more < most < 0 and most > -0.005


def test_the_sample_follows_the_seed():
    first, second, other = draws(8, 1, seed=3)[0], draws(8, 1, seed=3)[0], draws(8, 1, seed=4)[0]
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


def test_a_vocabulary_of_800_000_is_sampled_to_its_end():
    torch.manual_seed(0)
    vocab_size, samples = 800_000, [log_uniform_sample(8192, 800_000) for _ in range(10)]
    for sample_N, log_count_N in samples:
        assert len(sample_N.unique()) == 8192 and log_count_N.isfinite().all()
    # The corrected number of classes in the last tenth, where a class is in 1 of 400 samples.
    counted = [(-log_count[sample >= 720_000]).exp().sum() for sample, log_count in samples]
    estimates = torch.stack(counted)[:, None] / (vocab_size - 720_000)
    assert z_scores(estimates, 1.0) < 4.5 and estimates.std() < 0.2


@pytest.mark.parametrize("num_sampled", [0, -1, VOCAB, VOCAB + 1])
def test_a_sample_size_out_of_range_is_refused(num_sampled):
    with pytest.raises(
        ValueError, match=rf"num_sampled={num_sampled} must be at least 1 and below vocab_size={VOCAB}"
    ):
        log_uniform_sample(num_sampled, VOCAB)
