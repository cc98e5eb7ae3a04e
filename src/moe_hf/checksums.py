"""Checksums of a checkpoint's files, which reveal a flipped bit before a run resumes from the checkpoint."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import InputError

CHECKSUM_FILE = "checksums.json"


def write_checksums(folder: str | Path) -> None:
    """Write the checksums of all files of a checkpoint into a file that appears only when it is complete.

    Args:
        folder: the finished checkpoint.
    """
    folder = Path(folder)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    unfinished = folder / f"{CHECKSUM_FILE}.unfinished"
    unfinished.write_text(json.dumps(_checksums(folder, names), indent=1) + "\n", encoding="utf-8")
    unfinished.replace(folder / CHECKSUM_FILE)


def check_checksums(folder: str | Path) -> bool:
    """Check that the files of a checkpoint are as they were saved.

    Args:
        folder: the checkpoint.

    Returns:
        whether the checkpoint has checksums. Earlier releases and the plain `Trainer` write none.

    Raises:
        InputError: a file is missing or changed; the message names it.
    """
    folder = Path(folder)
    file = folder / CHECKSUM_FILE
    if not file.is_file():
        return False
    try:
        saved = {str(name): str(checksum) for name, checksum in json.loads(file.read_bytes()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"checkpoint {folder} is broken: {CHECKSUM_FILE} cannot be read") from error
    for name in saved:
        if not (folder / name).is_file():
            raise InputError(f"checkpoint {folder} is incomplete: {name} is missing")
    try:
        found = _checksums(folder, list(saved))
    except OSError as error:
        raise InputError(f"checkpoint {folder} is broken: {error.filename} cannot be read ({error})") from error
    for name, checksum in saved.items():
        if found[name] != checksum:
            raise InputError(f"checkpoint {folder} is broken: {name} is not as it was saved, its checksum differs")
    return True


def _checksums(folder: Path, names: list[str]) -> dict[str, str]:
    """Return {name: SHA-256}; takes about a second per gigabyte and thread."""
    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(lambda name: _sha256(folder / name), names)))


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
