"""Expands paths that users write: `~`, `${VARIABLE}` and globs."""

import glob
import os
import re
import stat

from ..errors import InputError


def expand_path(path: str, argument: str) -> str:
    """Expand `~` and `${VARIABLE}`.

    Args:
        path: the path as the user wrote it.
        argument: the argument's name in error messages.

    Raises:
        InputError: a variable is not set.
    """

    def value(match: re.Match) -> str:
        if match[1] not in os.environ:
            raise InputError(f"{argument}: {path!r} needs the environment variable {match[1]}, which is not set")
        return os.environ[match[1]]

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", value, path))


def expand_file_patterns(patterns: list[str] | str, argument: str = "files") -> list[str]:
    """Expand `~`, `${VARIABLE}` and globs to absolute file paths.

    Args:
        patterns: one pattern, or several. A file that is named twice is returned twice.
        argument: the argument's name in error messages.

    Returns:
        The paths in the order of the patterns, and sorted for each pattern.

    Raises:
        InputError: a variable is not set, a pattern does not match a file, or it names a folder, a pipe or a device.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    paths = []
    for pattern in patterns:
        expanded = expand_path(pattern, argument)
        found = [expanded] if os.path.isfile(expanded) else _matches(expanded)
        if not found:
            shown = repr(pattern) + f" (= {expanded})" * (expanded != pattern)
            raise InputError(f"{argument}: {_why_not_a_file(expanded, shown)}")
        paths.extend(map(os.path.abspath, found))
    if not paths:
        raise InputError(f"{argument}=[] names no file, at least one is needed")
    return paths


def _matches(pattern: str) -> list[str]:
    if "\0" in pattern:  # glob does not accept it
        return []
    return sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))


def _why_not_a_file(path: str, shown: str) -> str:
    """Return why a path is not a regular file; error messages name it as `shown`."""
    once = "which can be read only once, but later runs look the text up by its file: write it into a file first"
    if path == "-":
        return f"{shown} is standard input, {once}"
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        if "\0" not in path and os.path.islink(path):
            return f"{shown} is a link to {os.readlink(path)}, which does not exist"
        return f"no file matches {shown}"
    if stat.S_ISDIR(mode):
        return f"{shown} is a folder: name the files in it, such as {os.path.join(path, '*.txt')!r}"
    if stat.S_ISFIFO(mode):
        return f"{shown} is a pipe, {once}"
    return f"{shown} is a {'socket' if stat.S_ISSOCK(mode) else 'device'}, not a file"
