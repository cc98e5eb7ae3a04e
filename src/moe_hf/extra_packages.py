"""The packages of the extra `eval`, looked for before there is any work that their absence would waste."""

import importlib.util

from .errors import InputError


def require_packages(*names: str) -> None:
    """Check that packages of the extra `eval` are installed.

    Raises:
        InputError: one is missing; the message says how to install it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"the package {name!r} is missing, which comes with the extra 'eval': run pip install '.[eval]' in a "
                "checkout of moe_hf (it is in no package index)"
            )
