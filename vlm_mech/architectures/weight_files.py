"""What weights are by the files they come from, whose hashes are remembered, so that gigabytes are read once.

The user's cache folder is `$VLM_MECH_CACHE`, or `vlm_mech` where the system keeps caches. What lies there can be
deleted at any time; where it cannot be written, nothing is remembered.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

LARGE = 2**26
"""Bytes from which on a file's hash is remembered; a second is enough to read anything smaller."""
BLOB = re.compile(r"[0-9a-f]{64}")
"""Names of the hub's files in its own cache, where these are their SHA-256."""


def cache_folder() -> Path:
    """Where things are remembered from one process to the next."""
    given = os.environ.get("VLM_MECH_CACHE")
    return Path(given) if given else Path(user_cache_dir("vlm_mech", appauthor=False))


def remembered(kind: str, key: str) -> dict[str, Any] | None:
    """What was remembered under a key, if it can be read."""
    with contextlib.suppress(OSError, ValueError):
        told = json.loads(_place(kind, key).read_text())
        return told if isinstance(told, dict) else None
    return None


def remember(kind: str, key: str, told: Mapping[str, Any]) -> None:
    """Writes it whole or not at all, and goes on in silence where nothing can be written."""
    place = _place(kind, key)
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as written:
            json.dump(dict(told), written)
        os.replace(written.name, place)


def _place(kind: str, key: str) -> Path:
    return cache_folder() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def files_hash(folder: Path, pattern: str = "*.safetensors") -> str | None:
    """A hash of the names and contents of a folder's files of some kind; None where there are none."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    if not files:
        return None
    found = hashlib.sha256()
    for path in files:
        found.update(f"{path.name} {file_hash(path)}\n".encode())
    return found.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of a file: the name of the hub's blob, or as remembered for its path, size and time, or read now.

    Files below `LARGE` bytes are always read.

    Raises:
        OSError: it cannot be read.
    """
    real = path.resolve()
    state = real.stat()
    if real.parent.name == "blobs" and BLOB.fullmatch(real.name):
        return real.name
    if state.st_size < LARGE:
        return _read(real)
    now = {"path": str(real), "size": state.st_size, "time": state.st_mtime_ns, "inode": state.st_ino}
    told = remembered("hashes", str(real))
    if told is not None and now.items() <= told.items() and BLOB.fullmatch(str(told.get("sha256"))):
        return str(told["sha256"])
    found = _read(real)
    remember("hashes", str(real), now | {"sha256": found})
    return found


def _read(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
