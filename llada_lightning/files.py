"""Files that appear whole or not at all, and JSON that every reader takes."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from llada_lightning.errors import UserError

_BLOCK_BYTES = 1 << 20


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to, and renames it once the block has ended well.

    A link stays a link: the file that it leads to is replaced.

    Raises:
        UserError: as :func:`require_replaceable`.
    """
    require_replaceable(path)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{path.stem}.{uuid4().hex}{path.suffix}")  # writers go by the given suffix
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def require_replaceable(path: Path) -> None:
    """Refuses what a rename would destroy: a device, a pipe, a folder, a link that leads back to itself.

    Raises:
        UserError: the path is there and is no regular file.
    """
    is_loop = Path(os.path.realpath(path)).is_symlink()
    if is_loop or (path.exists() and not path.is_file()):
        raise UserError(f"'{path}' is no regular file, so it cannot be replaced; choose another file")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """A file's SHA-256 in hexadecimal, read in blocks; OSError where it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def strict_json(value: Any) -> Any:
    """The same value with every non-finite number as None, because JSON has no NaN; tuples become lists."""
    if isinstance(value, dict):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented, strict JSON, atomically."""
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(strict_json(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
