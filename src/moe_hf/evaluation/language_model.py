"""Evaluates a language model on text: perplexity, and the balance of the experts."""

import time

from torch.utils.data import DataLoader

from ..data.cache_folder import cached_in
from ..data.text import load_text_dataset, tokenize_to_stream
from ..data.windows import StreamWindows, collate_windows
from ..families import LANGUAGE_MODELS
from ..loading import load_model_and_tokenizer
from ..models.balancing import cv_squared
from ..routing.observe import RoutingTotals, load_statistics, routing_totals
from ..translator import move_to_device
from .metrics import load_metric
from .summed_loss import perplexities, summed_stream_loss


def evaluate_lm(
    model_name_or_path: str, files: list[str], window_length: int = 64, carry_state: bool = True, batch_size: int = 16
) -> dict[str, float]:
    """Evaluate a model on text files.

    Args:
        model_name_or_path: folder or Hub name of the model and its tokenizer.
        files: as for `measure_lm`.
        window_length: as for `measure_lm`.
        carry_state: as for `measure_lm`.
        batch_size: as for `measure_lm`.

    Returns:
        the metrics of `LmTrainer.evaluate`, and for each MoE layer cv_importance, cv_load, max_over_mean_load and
        dead_experts over the whole text.

    Raises:
        InputError: the model, its tokenizer or a file cannot be read, the text is shorter than the rows, or a package
            for the metrics is missing.
    """
    load_metric("stream_perplexity")  # fails before the text is read
    model, tokenizer = load_model_and_tokenizer(model_name_or_path, LANGUAGE_MODELS)
    metrics, totals = measure_lm(model, tokenizer, files, window_length, carry_state, batch_size)
    for layer, total in totals.items():
        values = {"cv_importance": cv_squared(total.importance).sqrt().item(), **load_statistics(total.tokens)}
        metrics |= {f"{layer}/{name}": value for name, value in values.items()}
    return metrics


def measure_lm(
    model, tokenizer, files: list[str], window_length: int = 64, carry_state: bool = True, batch_size: int = 16
) -> tuple[dict[str, float], dict[str, RoutingTotals]]:
    """Run a model over text files once, in evaluation mode.

    Args:
        model (PreTrainedModel): a language model with its softmax.
        tokenizer (PreTrainedTokenizerBase): the model's tokenizer.
        files: text files, see `load_text_dataset`.
        window_length: tokens of a window. With `carry_state`, it changes speed and memory, but not the result.
        carry_state: whether each window starts from the state after the previous window; otherwise from zero.
        batch_size: number of rows that the text is cut into (fewer for a short text). Each row starts from a zero
            state, so perplexities are exactly comparable only with the same number of rows.

    Returns:
        the metrics of `LmTrainer.evaluate`, and the load of each expert (`routing_totals`).

    Raises:
        InputError: a file cannot be read, or the text is shorter than the rows.
    """
    with cached_in(None):
        stream = tokenize_to_stream(load_text_dataset(files), tokenizer)
    batch_size = max(1, min(batch_size, (len(stream) - 1) // max(1, window_length)))
    windows = StreamWindows(stream, window_length, num_rows=batch_size)
    model = move_to_device(model).eval()
    loader = DataLoader(windows, batch_size=batch_size, collate_fn=collate_windows)
    batches = ({name: tensor.to(model.device) for name, tensor in batch.items()} for batch in loader)
    start = time.time()
    with routing_totals(model) as totals:
        nats, num_tokens = summed_stream_loss(model, batches, carry_state).tolist()
    seconds = time.time() - start
    metrics = perplexities(nats, num_tokens, stream.num_words)
    metrics |= {"runtime": round(seconds, 3), "tokens_per_second": round(num_tokens / seconds, 1)}
    return {f"eval_{name}": value for name, value in metrics.items()}, totals
