"""Beam search with GNMT's score (Wu et al., 2016, section 7), plugged into generate() of an encoder-decoder model:

    model.generate(**inputs, num_beams=4, custom_generate=gnmt_beam_search, length_alpha=0.2, coverage_beta=0.2)

    score(Y, X) = log P(Y | X) / lp(Y) + cp(X, Y)

Transformers' `length_penalty` is not used.

Shape suffixes: B batch, K beams, C candidates, S source length, L longest output. The model's rows are the B * K
beams; the beams of one source are adjacent.
"""

from typing import NamedTuple

import torch
from transformers.generation import (
    GenerateBeamEncoderDecoderOutput,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from .models.cache import CACHE_NAME


def length_penalty(length: torch.Tensor | int, alpha: float) -> torch.Tensor | float:
    """lp(Y) = ((5 + |Y|) / 6)^alpha. |Y| is the number of generated tokens, the end-of-sentence token included."""
    return ((5 + length) / 6) ** alpha


def coverage_penalty(coverage: torch.Tensor, mask: torch.Tensor, beta: float) -> torch.Tensor:
    """cp(X, Y) = beta * sum_i log(min(sum_j p_ij, 1)).

    Args:
        coverage: (..., S), the attention that each source position got over all steps, including the last. As in
            GNMT's formula, the end of the source and a language tag count as positions.
        mask: (..., S) bool, False for source padding, which the sum leaves out.
        beta: the weight of the penalty, not negative.

    Returns:
        (...), not positive. For a position without attention, the smallest normal number replaces the sum.
    """
    tiny = torch.finfo(coverage.dtype).tiny
    return beta * coverage.clamp(tiny, 1).log().masked_fill(~mask, 0).sum(dim=-1)


class Hypotheses(NamedTuple):
    """Several outputs for each source. Positions that are not written yet hold padding and beam -1."""

    tokens: torch.Tensor  # (B, C, prompt + L)
    beams: torch.Tensor  # (B, C, L), the row of the batch that gave each token
    log_probs: torch.Tensor  # (B, C), of all tokens together
    coverage: torch.Tensor  # (B, C, S), attention that each source position got

    def take(self, index_BC: torch.Tensor) -> "Hypotheses":
        """Return the hypotheses with the given indices, for each source."""
        return Hypotheses(*(x.take_along_dim(index_BC.view(*index_BC.shape, *[1] * (x.dim() - 2)), 1) for x in self))

    def joined_with(self, other: "Hypotheses") -> "Hypotheses":
        """Return the hypotheses of both, for each source."""
        return Hypotheses(*(torch.cat(pair, dim=1) for pair in zip(self, other)))


def gnmt_beam_search(
    model,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    length_alpha: float = 0.2,
    coverage_beta: float = 0.2,
    **model_kwargs,
) -> GenerateBeamEncoderDecoderOutput | torch.LongTensor:
    """Beam search whose finished hypotheses are ranked by GNMT's score; give it to generate() as `custom_generate`.

    Unfinished hypotheses all have the same length and are ranked by log P. The search of a sentence ends when no
    unfinished hypothesis can beat the `num_return_sequences` best finished ones. This bound is exact: log P only
    falls, lp is largest at the maximal length, and cp is at most 0. A wide enough beam therefore finds the best
    output. With `early_stopping=True` the search ends as soon as `num_beams` hypotheses are finished. An output that
    reaches `max_length` counts as finished.

    Args:
        model (PreTrainedModel): an encoder-decoder model, from generate().
        input_ids: the outputs' start, from generate().
        logits_processor: from generate().
        stopping_criteria: from generate().
        generation_config: from generate(). `num_beams`, `num_return_sequences`, `early_stopping`, `max_length`,
            `return_dict_in_generate` and the `output_...` switches are used.
        length_alpha: alpha of the length normalisation; 0 turns it off.
        coverage_beta: beta of the coverage penalty; 0 turns it off.
        **model_kwargs (Any): from generate().

    Returns:
        sequences (B * num_return_sequences, length), best first. With `return_dict_in_generate`, the same output class
        as Transformers' beam search: `compute_transition_scores(sequences, scores, beam_indices)` gives the
        log-probability of each chosen token. sequences_scores are GNMT's scores; a missing hypothesis has score -inf.

    Raises:
        ValueError: `length_alpha` or `coverage_beta` is negative, `do_sample` is True, or the model has no
            cross-attention.
    """
    _check_arguments(length_alpha, coverage_beta, generation_config)
    num_beams, num_returned = generation_config.num_beams, generation_config.num_return_sequences
    prompt, max_new_tokens = input_ids.shape[1], generation_config.max_length - input_ids.shape[1]
    source_mask = _source_mask(model_kwargs)
    running = _start(input_ids, source_mask, max_new_tokens, generation_config)
    source_mask_B1S = source_mask.view(*running.log_probs.shape, -1)[:, :1]
    finished = finished_scores = None
    is_open_B = torch.ones_like(running.log_probs[:, 0], dtype=torch.bool)
    steps = _new_steps(generation_config)
    for length in range(1, max_new_tokens + 1):
        flat_ids = running.tokens[..., : prompt + length - 1].flatten(0, 1)
        outputs = _run_model(model, flat_ids, generation_config, model_kwargs, is_first=length == 1)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=True)
        logits = outputs.logits[:, -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_probs = logits_processor(flat_ids, logits.log_softmax(dim=-1))
        _record_step(steps, outputs, logits=logits, scores=log_probs)
        candidates = _extend(running, outputs, log_probs, prompt, length, generation_config)
        ends = stopping_criteria(candidates.tokens[..., : prompt + length].flatten(0, 1), None)
        ends_BC = ends.view_as(candidates.log_probs)

        scores_BC = candidates.log_probs / length_penalty(length, length_alpha)
        scores_BC = scores_BC + coverage_penalty(candidates.coverage, source_mask_B1S, coverage_beta)
        scores_BC = scores_BC.masked_fill(~(ends_BC & is_open_B[:, None]), -torch.inf)
        finished, finished_scores = _finish(finished, finished_scores, candidates, scores_BC, num_beams)

        log_probs_BK, left_BK = candidates.log_probs.masked_fill(ends_BC, -torch.inf).topk(num_beams, dim=1)
        running = candidates.take(left_BK)._replace(log_probs=log_probs_BK)
        if model_kwargs.get(CACHE_NAME) is not None:
            model_kwargs[CACHE_NAME].reorder_cache(running.beams[..., length - 1].flatten())
        worst_returned_B = finished_scores[:, num_returned - 1]
        is_open_B &= _can_improve(log_probs_BK[:, 0], worst_returned_B, max_new_tokens, length_alpha)
        if generation_config.early_stopping is True:
            is_open_B &= finished_scores[:, -1].isinf()
        if not is_open_B.any():
            break
    best = Hypotheses(*(x[:, :num_returned] for x in finished))
    sequences, beam_indices = _sequences(best, prompt)
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateBeamEncoderDecoderOutput(
        sequences=sequences,
        sequences_scores=finished_scores[:, :num_returned].flatten(),
        beam_indices=beam_indices,
        **steps,
        **_encoder_records(model_kwargs["encoder_outputs"], generation_config),
        **{CACHE_NAME: model_kwargs.get(CACHE_NAME)},
    )


def _check_arguments(length_alpha: float, coverage_beta: float, generation_config: GenerationConfig) -> None:
    for name, value in (("length_alpha", length_alpha), ("coverage_beta", coverage_beta)):
        if value < 0:
            raise ValueError(f"{name}={value} must not be negative")
    if generation_config.do_sample:
        raise ValueError("do_sample=True: gnmt_beam_search does not sample, only False is allowed")


def _source_mask(model_kwargs: dict) -> torch.Tensor:
    """(B * K, S) bool, False for source padding."""
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        return torch.ones_like(model_kwargs["encoder_outputs"].last_hidden_state[..., 0], dtype=torch.bool)
    return mask.bool()


def _start(
    input_ids: torch.Tensor, source_mask: torch.Tensor, max_new_tokens: int, generation_config: GenerationConfig
) -> Hypotheses:
    """Put the prompt into the first beam of each source; the other beams get probability 0, to avoid duplicates."""
    num_beams = generation_config.num_beams
    padding, eos = generation_config._pad_token_tensor, generation_config._eos_token_tensor
    padding = eos[0] if padding is None and eos is not None else padding
    new_tokens = input_ids.new_full((len(input_ids), max_new_tokens), -1 if padding is None else int(padding))
    rows = (len(input_ids) // num_beams, num_beams, -1)
    coverage = source_mask.new_zeros(source_mask.shape, dtype=torch.float32).view(rows)
    log_probs = coverage.new_full(rows[:2], -torch.inf)
    log_probs[:, 0] = 0
    tokens = torch.cat([input_ids, new_tokens], dim=1).view(rows)
    return Hypotheses(tokens, torch.full_like(new_tokens, -1).view(rows), log_probs, coverage)


def _run_model(
    model, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict, is_first: bool
):
    """Return the model's outputs for the next token, with the attention of that step."""
    model_kwargs = model_kwargs | {"output_attentions": True}
    if is_first:
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
    else:
        new = 1 if model_kwargs.get("use_cache") else None
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=new, **model_kwargs)
        is_compiled = model._valid_auto_compile_criteria(model_kwargs, generation_config)
        forward = model.get_compiled_call(generation_config.compile_config) if is_compiled else model
        outputs = forward(**inputs, return_dict=True)
    if not outputs.cross_attentions:
        raise ValueError(f"gnmt_beam_search needs cross-attention, {type(model).__name__} gives none")
    return outputs


def _new_steps(generation_config: GenerationConfig) -> dict[str, tuple]:
    """Return the outputs requested for each step, by the library's names: tuples with one entry per step."""
    config = generation_config
    asked = {
        "scores": config.output_scores,
        "logits": config.output_logits,
        "decoder_attentions": config.output_attentions,
        "cross_attentions": config.output_attentions,
        "decoder_hidden_states": config.output_hidden_states,
    }
    return {name: () for name, is_asked in asked.items() if is_asked and config.return_dict_in_generate}


def _record_step(steps: dict[str, tuple], outputs, **computed: torch.Tensor) -> None:
    """Append a step's `computed` scores and logits (B * K, V), and the model's outputs."""
    for name in steps:
        steps[name] += (computed[name] if name in computed else outputs.get(name),)


def _encoder_records(encoder_outputs, generation_config: GenerationConfig) -> dict:
    """Return the outputs requested for the encoder, by the library's names."""
    asked = {
        "attentions": generation_config.output_attentions,
        "hidden_states": generation_config.output_hidden_states,
    }
    return {f"encoder_{name}": encoder_outputs.get(name) for name, is_asked in asked.items() if is_asked}


def _extend(
    running: Hypotheses,
    outputs,
    log_probs: torch.Tensor,
    prompt: int,
    length: int,
    generation_config: GenerationConfig,
) -> Hypotheses:
    """Return the best continuations of each source's hypotheses by one token, the `length`-th new token.

    Args:
        log_probs: (B * K, V), of the next token.
        prompt: tokens before the first new one.
    """
    batch, num_beams = running.log_probs.shape
    log_probs = log_probs.view(batch, num_beams, -1)
    vocab_size = log_probs.shape[-1]
    eos = generation_config._eos_token_tensor
    num_kept = min((1 + max(1, 0 if eos is None else len(eos))) * num_beams, num_beams * vocab_size)
    values, index = (running.log_probs[..., None] + log_probs).flatten(1).topk(num_kept, dim=1)
    beam_BC, token_BC = index // vocab_size, index % vocab_size

    attention = outputs.cross_attentions[-1][:, :, -1].mean(dim=1).view_as(running.coverage)
    candidates = running._replace(coverage=running.coverage + attention).take(beam_BC)
    candidates.tokens[..., prompt + length - 1] = token_BC
    candidates.beams[..., length - 1] = beam_BC + num_beams * torch.arange(batch, device=index.device)[:, None]
    return candidates._replace(log_probs=values)


def _finish(
    finished: Hypotheses | None,
    finished_scores: torch.Tensor | None,
    candidates: Hypotheses,
    scores_BC: torch.Tensor,
    num_beams: int,
) -> tuple[Hypotheses, torch.Tensor]:
    """Return the best `num_beams` of the finished hypotheses and the candidates; unfinished candidates score -inf.

    As in every beam search, only the best `num_beams` candidates may finish. The other candidates ensure that
    `num_beams` unfinished hypotheses remain.
    """
    scores_BC = scores_BC.clone()
    scores_BC[:, num_beams:] = -torch.inf
    if finished is not None:
        candidates = finished.joined_with(candidates)
        scores_BC = torch.cat([finished_scores, scores_BC], dim=1)
    best_scores_BK, best_BK = scores_BC.topk(num_beams, dim=1)
    return candidates.take(best_BK), best_scores_BK


def _can_improve(
    log_probs_B: torch.Tensor, worst_returned_B: torch.Tensor, max_new_tokens: int, length_alpha: float
) -> torch.Tensor:
    """Return (B,), whether an unfinished hypothesis with this log P may still beat the worst score to be returned.

    log P is negative and only falls with further tokens, lp is largest for the longest output, and cp is never
    positive. The final score is therefore at most log P / lp(longest).
    """
    return log_probs_B / length_penalty(max_new_tokens, length_alpha) > worst_returned_B


def _sequences(finished: Hypotheses, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (rows, prompt + longest) and beams (rows, longest), as generate() returns them."""
    beams = finished.beams.flatten(0, 1)
    longest = int((beams >= 0).sum(dim=1).max())
    return finished.tokens.flatten(0, 1)[:, : prompt + longest], beams[:, :longest]


__all__ = ["coverage_penalty", "gnmt_beam_search", "length_penalty"]
