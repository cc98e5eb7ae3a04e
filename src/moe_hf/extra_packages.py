"""Checks that the packages of the extra `eval` are installed, before a command does work that needs them."""

import importlib.util

from .errors import InputError


def require_packages(*names: str) -> None:
    """Check that packages of the extra `eval` are installed.

    Raises:
        InputError: a package is missing; the message says how to install it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"the package {name!r} is missing, which comes with the extra 'eval': run pip install '.[eval]' in a "
                "checkout of moe_hf (moe_hf is not on PyPI)"
            )
