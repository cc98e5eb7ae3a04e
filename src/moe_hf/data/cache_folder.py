"""The cache folder for text and tokens."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets

from ..writing import check_folder, naming


@contextmanager
def cached_in(cache_dir: str | None) -> Iterator[None]:
    """Context for loading and tokenising text, in which write errors name the cache folder.

    Args:
        cache_dir: the folder; None for the default of `datasets`.

    Raises:
        InputError: the folder cannot be written.
    """
    place = ("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE) if cache_dir is None else ("cache_dir", cache_dir)
    check_folder(place[1], place[0])
    with naming(*place):
        yield
