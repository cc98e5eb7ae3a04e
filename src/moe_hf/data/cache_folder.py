"""The folder that text and tokens are cached in."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets

from ..writing import check_folder, naming


@contextmanager
def cached_in(cache_dir: str | None) -> Iterator[None]:
    """Load and tokenise text inside: errors of writing name the folder.

    Args:
        cache_dir: None for the default of `datasets`.

    Raises:
        InputError: the folder cannot be written.
    """
    place = ("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE) if cache_dir is None else ("cache_dir", cache_dir)
    check_folder(place[1], place[0])
    with naming(*place):
        yield
