"""Paths that users write: `~`, `${VARIABLE}` and globs."""

import glob
import os
import re

from ..errors import InputError


def expand_path(path: str, argument: str) -> str:
    """Expand `~` and `${VARIABLE}`.

    Args:
        path: as the user wrote it.
        argument: the argument that `path` was given for, named in errors.

    Raises:
        InputError: a variable is not set.
    """

    def value(match: re.Match) -> str:
        if match[1] not in os.environ:
            raise InputError(f"{argument}: {path!r} needs the environment variable {match[1]}, which is not set")
        return os.environ[match[1]]

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", value, path))


def expand_file_patterns(patterns: list[str] | str) -> list[str]:
    """Expand `~`, `${VARIABLE}` and globs to absolute file paths.

    Args:
        patterns: one pattern, or several; a file comes as often as it is named.

    Returns:
        The paths in the order of the patterns, sorted within each.

    Raises:
        InputError: a variable is not set, or no file matches.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    paths = []
    for pattern in patterns:
        expanded = expand_path(pattern, "files")
        is_literal = os.path.isfile(expanded)
        found = [expanded] if is_literal else sorted(filter(os.path.isfile, glob.glob(expanded, recursive=True)))
        if not found:
            raise InputError(f"files: no file matches {pattern!r}" + f" (= {expanded})" * (expanded != pattern))
        paths.extend(map(os.path.abspath, found))
    if not paths:
        raise InputError("files=[] names no file, at least one is needed")
    return paths
