"""A `Trainer` mixin that trains on the batches of a `TokenBatchSampler`."""

from torch.utils.data import DataLoader

from ..data.token_batches import TokenBatchSampler


class TokenBatchTrainerMixin:
    """A mixin: list it before `Trainer`, or a subclass of it, in the bases.

    Args:
        train_batch_sampler: the batches of `train_dataset`; `per_device_train_batch_size` is not used.

    The other arguments are as for the Trainer. Several processes, gradient accumulation and resumption in the middle
    of an epoch work.
    """

    def __init__(self, *args, train_batch_sampler: TokenBatchSampler | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.train_batch_sampler = train_batch_sampler

    def get_train_dataloader(self) -> DataLoader:
        if self.train_batch_sampler is None:
            return super().get_train_dataloader()
        loader = DataLoader(
            self._remove_unused_columns(self.train_dataset, description="training"),
            batch_sampler=self.train_batch_sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def _run_epoch(self, *args, epoch: int, **kwargs):
        # The Trainer passes the epoch to a sampler inside one wrapper. Several processes that resume in the middle of
        # an epoch have two wrappers, and would continue in the order of the first epoch.
        if self.train_batch_sampler is not None:
            self.train_batch_sampler.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)
