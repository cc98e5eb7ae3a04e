"""Adapts generate() to a recurrent state, where the library expects keys and values."""

import copy
import functools

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .cache import CACHE_NAME
from .pretrained_moe import check_ids


class MoeGenerationMixin(GenerationMixin):
    """The library's `generate()`, with one-line errors for features that a recurrent model does not support."""

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs_tensor, model_kwargs: dict, *args, **kwargs) -> dict:
        """Drop `labels`: `Seq2SeqTrainer` passes the whole batch to generate(), which passes it to the encoder."""
        model_kwargs.pop("labels", None)
        reads_ids = model_kwargs.get("encoder_outputs") is None and not inputs_tensor.is_floating_point()
        if reads_ids:
            check_ids("input_ids", inputs_tensor, self.config.vocab_size, may_wait=True)
        return super()._maybe_prepare_encoder_kwargs_for_generation(inputs_tensor, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(self, *args, encoder_outputs=None, **kwargs):
        """Repeat rows for each beam in a copy of `encoder_outputs`: the library would change the caller's object."""
        if encoder_outputs is not None:
            kwargs["encoder_outputs"] = copy.copy(encoder_outputs)
        return super()._expand_inputs_for_generation(*args, **kwargs)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # the library reads the signature
    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        """Return the inputs of a forward pass, without the tokenizers that generate() passes on.

        The state keeps its older name in every version of the library. PEFT 0.21 only knows the older name; without
        it, PEFT inserts a learnt prompt before every token.
        """
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        if kwargs.get("next_sequence_length") == 1 and not kwargs.get("is_first_iteration"):
            # Generated tokens are never padding, and a growing mask would change the shapes of a compiled step.
            inputs.pop("decoder_attention_mask" if self.config.is_encoder_decoder else "attention_mask", None)
        return {name: value for name, value in inputs.items() if name not in ("tokenizer", "assistant_tokenizer")}

    def _prefill(self, input_ids, generation_config: GenerationConfig, model_kwargs: dict, *args, **kwargs):
        """Run the first forward pass.

        Raises:
            ValueError: a cache with tokens does not fit the rows or the tokens, or a translation has
                `prefill_chunk_size`.
        """
        if self.config.is_encoder_decoder and generation_config.prefill_chunk_size is not None:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} is for the prompt of a language model, "
                "leave it out for a translation"
            )
        name = "decoder_input_ids" if self.config.is_encoder_decoder else "input_ids"
        check_ids(name, input_ids, self.config.vocab_size, may_wait=True)
        cache = model_kwargs.get(CACHE_NAME)
        if cache is not None and cache.get_seq_length() > 0:
            self._check_filled_cache(cache, input_ids, generation_config, model_kwargs)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _check_filled_cache(self, cache, input_ids, generation_config: GenerationConfig, model_kwargs: dict) -> None:
        ids_name, mask_name = "input_ids", "attention_mask"
        if self.config.is_encoder_decoder:
            ids_name, mask_name = f"decoder_{ids_name}", f"decoder_{mask_name}"
            cache = getattr(cache, "self_attention_cache", cache)  # the forward pass refuses other kinds
        rows, length = input_ids.shape
        cached_rows = max(layer.batch_size for layer in cache.layers if hasattr(layer, "batch_size"))
        if cached_rows != rows:
            raise ValueError(
                f"{CACHE_NAME} keeps the state of {cached_rows} rows, generate() needs {rows}, one for each beam of "
                f"each text: call {CACHE_NAME}.batch_repeat_interleave(num_beams) first, or leave {CACHE_NAME} out"
            )
        if not self.config.is_encoder_decoder and model_kwargs.get("inputs_embeds") is not None:
            return  # the library cuts off the embeddings of seen tokens
        mask, past = model_kwargs.get(mask_name), cache.get_seq_length()
        if mask is None and self.config.is_encoder_decoder:
            # The library sets this length only for language models; otherwise, it would read the seen tokens again.
            generation_config._mask_length = length
        is_whole = length == (generation_config._mask_length if mask is None else mask.shape[1])
        if is_whole and length > past:
            return
        # The library puts the start token before a translation's new tokens.
        if is_whole or self.config.is_encoder_decoder:
            instead = "" if self.config.is_encoder_decoder else f", or the new ones with the whole text's {mask_name}"
            raise ValueError(
                f"{ids_name} has {length} tokens, {CACHE_NAME} has seen {past} already: give the whole text, seen "
                f"tokens included{instead}"
            )

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor | None:
        """Return the mask unchanged; the library's mask for attention would have 4 dimensions."""
        return attention_mask

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, model_kwargs: dict, *args, **kwargs):
        """Prepare the cache as the library does; `compile_config` implies a static cache, which compilation needs."""
        if generation_config.compile_config is not None and model_kwargs.get("past_key_values") is None:
            generation_config.cache_implementation = generation_config.cache_implementation or "static"
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs: dict, generation_config: GenerationConfig) -> bool:
        """Decide as the library does, but on a CPU by `compile_config`: the library does not compile there."""
        if generation_config.compile_config is not None:
            generation_config.compile_config = copy.copy(generation_config.compile_config)
            generation_config.compile_config._compile_all_devices = True
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _get_static_cache_init_shape(self) -> None:
        """Return None, so that the first forward pass creates the state."""

    def _get_stopping_criteria(
        self,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> StoppingCriteriaList:
        """Return the library's criteria; `stop_strings` also work with a tokenizer of whole words."""
        stop_strings = generation_config.stop_strings
        if tokenizer is None or stop_strings is None or not _knows_whole_words_only(tokenizer):
            return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)
        generation_config.stop_strings = None
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer)
        generation_config.stop_strings = stop_strings
        criteria.append(WordStopStringCriteria(tokenizer, stop_strings))
        return criteria

    def heal_tokens(self, input_ids, tokenizer: PreTrainedTokenizerBase | None = None):
        """Heal the prompt's last token as the library does.

        Raises:
            ValueError: the tokenizer has no `bos_token`, which the library needs.
        """
        if tokenizer is not None and tokenizer.bos_token_id is None:
            raise ValueError(
                "token_healing=True needs a tokenizer with a bos_token, this one has bos_token=None: leave "
                "token_healing out, and end the prompt with a whole word"
            )
        return super().heal_tokens(input_ids, tokenizer)

    def init_continuous_batching(self, *args, **kwargs):
        """Raise a ValueError: continuous batching needs pages of keys and values, unlike a recurrent state."""
        raise ValueError(
            f"generate_batch and continuous batching need attention layers, but {type(self).__name__} has an LSTM "
            "state: call generate() with a padded batch"
        )


def _knows_whole_words_only(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer does not know the text that `StopStringCriteria` puts before a token."""
    return tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokenizer("abcdef")["input_ids"]


class WordStopStringCriteria(StopStringCriteria):
    """`stop_strings` for a tokenizer of whole words, where the text of a token is a space and the word."""

    @staticmethod
    def clean_tokenizer_vocab(tokenizer, *args, **kwargs):
        vocabulary = tokenizer.get_vocab()
        return tuple(f" {word}" for word in vocabulary), tuple(vocabulary.values())


__all__ = ["MoeGenerationMixin"]
