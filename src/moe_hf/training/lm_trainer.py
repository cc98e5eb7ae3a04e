"""The Trainer of language models: carried LSTM state, exact resumption, stream perplexity."""

import os
import time
from pathlib import Path

import torch
from transformers import DynamicCache, Trainer

from ..errors import InputError
from ..evaluation.summed_loss import perplexities, summed_stream_loss
from ..models.cache import CACHE_NAME, cache_of
from .checkpoint_trainer import reading
from .moe_trainer import MoeTrainerMixin


class LmTrainer(MoeTrainerMixin, Trainer):
    """`Trainer` for `StreamWindows` datasets.

    Args:
        carry_state: pass the LSTM state of every row from each window to the next, detached (truncated
            back-propagation through time). The datasets must have as many rows as an optimizer step, see
            `StreamWindows`. The state is saved in checkpoints, and is zero at the start of each epoch.

    The other arguments are as for `Trainer`.
    """

    def __init__(self, *args, carry_state: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.args.remove_unused_columns = False  # the model takes `shift_labels` as a keyword
        self.carry_state = carry_state
        if carry_state:
            self._check_rows()
        # One state for each micro-batch of an optimizer step, because each micro-batch has separate rows.
        self._carried: dict[int, DynamicCache] = {}
        self._micro_batch = 0

    def _check_rows(self) -> None:
        """Check that batches have the dataset's rows; otherwise a row would get another row's state."""
        args, rows = self.args, getattr(self.train_dataset, "num_rows", None)
        if args.n_gpu > 1 or args.auto_find_batch_size:
            raise InputError(
                f"carry_state needs one GPU per process (now {args.n_gpu}; start one for each GPU with torchrun) and "
                f"auto_find_batch_size=False (now {args.auto_find_batch_size})"
            )
        if self.train_dataset is None:
            return
        expected = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if rows != expected or args.train_sampling_strategy != "sequential":
            raise InputError(
                f"carry_state needs a dataset with num_rows={expected} (batch size * accumulation steps * processes), "
                f"not {rows}, and train_sampling_strategy='sequential', not {args.train_sampling_strategy!r}"
            )

    def _run_epoch(self, *args, **kwargs):
        self._carried, self._micro_batch = {}, 0
        return super()._run_epoch(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (self.carry_state and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        cache = self._carried.get(self._micro_batch)
        if cache is None:
            cache = DynamicCache(config=self.model.config)
        inputs = {**inputs, CACHE_NAME: cache, "use_cache": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._carried[self._micro_batch] = detached(cache_of(outputs))
        self._micro_batch = (self._micro_batch + 1) % self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    # The carried state is saved and restored with the random state: both belong to the process, not to the model. Both
    # are written before trainer_state.json, which marks a checkpoint as complete.

    def _save_rng_state(self, output_dir: str) -> None:
        if self.carry_state:
            at_epoch_end = float(self.state.epoch).is_integer()
            carried = {} if at_epoch_end else {slot: _states(cache) for slot, cache in self._carried.items()}
            os.makedirs(output_dir, exist_ok=True)
            torch.save(carried, self._carried_file(output_dir))
        super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self.carry_state and checkpoint is not None:
            with reading(checkpoint, "carried state"):
                self._load_carried_state(checkpoint)

    def _load_carried_state(self, checkpoint: str) -> None:
        rank, world_size, rows = self.args.process_index, self.args.world_size, self.args.train_batch_size
        slots = self.args.gradient_accumulation_steps
        for index, (h, c, length) in _states_of_all_rows(checkpoint).items():
            if len(h) != slots * world_size * rows:
                raise ValueError(f"{len(h)} rows, expected {slots * world_size * rows}")
            # The rows of a step are ordered by micro-batch, then by process, for any number of both.
            for slot in range(slots):
                cache = self._carried.setdefault(slot, DynamicCache(config=self.model.config))
                start = (slot * world_size + rank) * rows
                state = (x[start : start + rows].to(self.args.device) for x in (h, c))
                cache.update(*state, index, num_tokens=length)

    def _carried_file(self, folder: str) -> str:
        return os.path.join(folder, f"carried_state_{self.args.process_index}.pt")

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return loss and perplexity, per token and per word, over every token of a `StreamWindows` dataset with rows.

        With `carry_state`, each window starts from the state after the previous window.

        Args:
            eval_dataset (StreamWindows | None): the dataset; None for the trainer's dataset.
            ignore_keys (list[str] | None): not used.
            metric_key_prefix: prefix of the metrics' names.

        Returns:
            `eval_loss` (nats per token), `eval_perplexity_per_token`, `eval_perplexity_per_word`,
            `eval_bits_per_word`, `eval_runtime` (seconds) and `eval_tokens_per_second`.

        Raises:
            InputError: the dataset and the batch have different numbers of rows.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        expected = self.args.eval_batch_size * self.args.world_size
        if self.carry_state and dataset.num_rows != expected:
            raise InputError(f"the evaluation dataset has num_rows={dataset.num_rows}, not {expected}, a batch's rows")
        dataloader = self.get_eval_dataloader(eval_dataset)
        self.callback_handler.eval_dataloader = dataloader
        start = time.time()
        self.model.eval()
        # Restores the random state: a DataLoader draws a number, but a run resumed at an epoch's end skips this
        # evaluation.
        random_state = torch.get_rng_state()
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            totals = summed_stream_loss(self.model, self._prepared(dataloader), self.carry_state)
        torch.set_rng_state(random_state)
        nats, num_tokens = self.accelerator.reduce(totals.to(self.args.device)).tolist()

        seconds = time.time() - start
        values = perplexities(nats, num_tokens, dataset.stream.num_words)
        values |= {"runtime": round(seconds, 3), "tokens_per_second": round(num_tokens / seconds, 1)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _prepared(self, dataloader):
        """Yield the batches on the device; call the callbacks after each batch."""
        for batch in dataloader:
            yield self._prepare_inputs(batch)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)


def detached(cache: DynamicCache) -> DynamicCache:
    """Return the cache with its states detached from the graph."""
    for layer in cache.layers:
        if hasattr(layer, "detach"):
            layer.detach()
    return cache


def _states_of_all_rows(checkpoint: str) -> dict[int, tuple]:
    """Return {layer: (h, c, length)} over all rows of an optimizer step, from all processes' files; {} for zeros."""
    files = sorted(Path(checkpoint).glob("carried_state_*.pt"), key=lambda file: int(file.stem.rpartition("_")[2]))
    if not files:
        raise InputError(
            f"checkpoint {checkpoint} has no carried_state_0.pt, which carry_state=True needs: the checkpoint is "
            "incomplete, or its run did not carry the state"
        )
    parts = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
    pieces = [part[slot] for slot in sorted(parts[0]) for part in parts]
    states = {}
    for index, (_, _, length) in pieces[0].items() if pieces else ():
        h, c = (torch.cat([piece[index][i] for piece in pieces]) for i in range(2))
        states[index] = (h, c, length)
    return states


def _states(cache: DynamicCache) -> dict[int, tuple]:
    """Return {layer: (h, c, length)} of the layers with a state."""
    return {
        i: (*layer.state, layer.get_seq_length()) for i, layer in enumerate(cache.layers) if hasattr(layer, "state")
    }
