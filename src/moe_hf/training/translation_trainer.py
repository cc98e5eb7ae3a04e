"""The Trainer of translation models: batches of similar numbers of tokens, perplexity and BLEU on held-out pairs."""

import time
from collections.abc import Callable

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Seq2SeqTrainer

from ..evaluation.held_out_pairs import EvaluationPairs, evaluation_batches, score_translations
from ..evaluation.summed_loss import perplexities, summed_pairs_loss
from ..models.configuration_gnmt_moe import GnmtMoeConfig
from ..models.task_loss import summed_cross_entropy
from ..translator import Translator
from .moe_trainer import MoeTrainerMixin
from .schedule import warmup_constant_inverse_sqrt
from .token_batch_trainer import TokenBatchTrainerMixin


def token_loss(model: PreTrainedModel) -> Callable:
    """Return a `compute_loss_func` for a model of Transformers, whose own loss is a mean without label smoothing.

    The loss equals that of this package's models: the sum over the tokens divided by their number, and while training
    with `config.label_smoothing` (default 0).
    """

    def loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
        smoothing = getattr(model.config, "label_smoothing", 0.0) if model.training else 0.0
        return summed_cross_entropy(outputs.logits, labels, smoothing) / num_items_in_batch

    return loss


class TranslationTrainer(MoeTrainerMixin, TokenBatchTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` for the datasets of `tokenize_pairs`, evaluated on `EvaluationPairs`.

    The model may also be another encoder-decoder model of Transformers that shifts labels; its loss is `token_loss`.

    Args:
        translate_arguments: arguments of the `Translator` in evaluations.

    The other arguments are as for `TokenBatchTrainerMixin` and `Seq2SeqTrainer`.
    """

    def __init__(self, *args, translate_arguments: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.model.config.model_type != GnmtMoeConfig.model_type:  # an adapter keeps the model type
            self.compute_loss_func = token_loss(self.model)
            self.data_collator.model = self.model  # shifts the labels, which the model then does not get
        self.translate_arguments = {"num_return_sequences": 1} | (translate_arguments or {})

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None and self.args.constant_steps:
            warmup_steps = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = warmup_constant_inverse_sqrt(
                self.optimizer if optimizer is None else optimizer, warmup_steps, self.args.constant_steps
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def evaluate(
        self, eval_dataset: EvaluationPairs | None = None, ignore_keys=None, metric_key_prefix="eval", **kwargs
    ) -> dict[str, float | str]:
        """Return the references' perplexity, and BLEU and chrF of translations, over all pairs and for each direction.

        Args:
            eval_dataset: the pairs; None for the trainer's pairs.
            ignore_keys (list[str] | None): not used.
            metric_key_prefix (str): prefix of the metrics' names.
            **kwargs (Any): not used.

        Returns:
            `eval_loss` (nats per token, without label smoothing), `eval_perplexity_per_token`,
            `eval_perplexity_per_word`, `eval_bleu`, `eval_bleu_lowercase`, `eval_chrf`, their signatures, and
            `eval_runtime` (seconds). With several directions, there are also `eval_bleu_en-de` and so on, and
            `eval_bleu` is the mean over the directions.
        """
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        start = time.time()
        self.model.eval()
        random_state = torch.get_rng_state()  # restored, as if there had been no evaluation
        metrics = self.perplexities(pairs)
        scores, self.translations = self._scores(pairs)
        torch.set_rng_state(random_state)
        metrics |= scores | {"runtime": round(time.time() - start, 3)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log({name: value for name, value in metrics.items() if not isinstance(value, str)})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def perplexities(self, pairs: EvaluationPairs) -> dict[str, float]:
        """Return the references' loss (nats per token), perplexity_per_token, perplexity_per_word, bits_per_word."""
        tokens = pairs.tokens.select_columns(["input_ids", "labels"])
        batches = evaluation_batches(pairs, self.args.eval_tokens_per_batch, self.args.world_size)
        # Does not use accelerate's `prepare`, which keeps every loader forever.
        batches = list(batches)[self.args.process_index :: self.args.world_size]
        loader = DataLoader(tokens, batch_sampler=batches, collate_fn=self.data_collator)
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            totals = summed_pairs_loss(self.model, map(self._prepare_inputs, loader))
        nats, num_tokens = self.accelerator.reduce(totals.to(self.args.device)).tolist()
        return perplexities(nats, num_tokens, sum(pairs.tokens["target_words"]))

    def _scores(self, pairs: EvaluationPairs) -> tuple[dict, list[str]]:
        rank, world_size = self.args.process_index, self.args.world_size
        if self.is_distributed_loading_by_transformers or self.is_fsdp_enabled:
            # The processes of a sharded model compute every step together, so each of them makes all translations.
            rank, world_size = 0, 1
        sources = pairs.tokens["input_ids"][rank::world_size]
        translator = Translator(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            **self.translate_arguments,
        )
        with tqdm(total=len(sources), desc="Translating", disable=None if rank == 0 else True, leave=False) as bar:
            found = [results[0].text for results in translator.translate_ids(sources, on_batch=bar.update)]
        if world_size == 1:
            return score_translations(found, pairs), found
        parts = gather_object([list(zip(range(rank, len(pairs), world_size), found))])
        translations = [text for _, text in sorted(entry for part in parts for entry in part)]
        return score_translations(translations, pairs), translations
