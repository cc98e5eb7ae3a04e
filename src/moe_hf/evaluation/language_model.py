"""Judge a trained language model on a text: perplexity, and how evenly the text uses the experts."""

import tempfile

from transformers import AutoModelForCausalLM

from ..errors import InputError
from ..training.arguments import LmTrainingArguments
from ..training.text_data import load_text_dataset, tokenize_to_stream
from ..training.tokenizers import load_tokenizer
from ..training.trainer import LmTrainer
from ..training.windows import StreamWindows, collate_windows
from .routing import counting_tokens, load_statistics


def evaluate_lm(
    model_name_or_path: str, files: list[str], window_length: int = 64, carry_state: bool = True, batch_size: int = 16
) -> dict[str, float]:
    """Evaluate a model on text files.

    Args:
        model_name_or_path: folder or Hub name of the model and its tokenizer.
        files: text files, see `load_text_dataset`.
        window_length: tokens of a window; with `carry_state` it changes speed and memory, not the result.
        carry_state: go on from the state of the window before; otherwise each window starts from zero.
        batch_size: rows that the text is cut into; the first token of each has no context.

    Returns:
        the metrics of `LmTrainer.evaluate`, and for each MoE layer cv_load, max_over_mean_load and dead_experts over
        the whole text.

    Raises:
        InputError: the model, its tokenizer or a file cannot be read, or the text is shorter than the rows.
    """
    tokenizer = load_tokenizer(model_name_or_path)
    try:
        model = AutoModelForCausalLM.from_pretrained(model_name_or_path)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"model_name_or_path={model_name_or_path}: cannot be loaded ({reason})") from error
    stream = tokenize_to_stream(load_text_dataset(files), tokenizer)
    with tempfile.TemporaryDirectory() as folder, counting_tokens(model) as counts:
        arguments = LmTrainingArguments(output_dir=folder, per_device_eval_batch_size=batch_size, report_to="none")
        trainer = LmTrainer(
            model=model,
            args=arguments,
            eval_dataset=StreamWindows(stream, window_length, num_rows=batch_size * arguments.world_size),
            data_collator=collate_windows,
            carry_state=carry_state,
        )
        metrics = trainer.evaluate()
    for layer, layer_counts in counts.items():
        metrics |= {f"{layer}/{name}": value for name, value in load_statistics(layer_counts).items()}
    return metrics
