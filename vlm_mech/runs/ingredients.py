"""What a run is made of: a digest of every file that its options name, so that a resumed run mixes no two models."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_mech.architectures.weight_files import file_hash
from vlm_mech.data.readers.registry import named

LINES = "pairs.jsonl"
"""A folder with this file is data; what its lines name belongs to it."""


def ingredients(options: Mapping[str, Any], *, besides: Path) -> dict[str, str]:
    """A digest of the files behind each option that names a file or a folder: models, data, tables of the user's.

    The name of a format before a colon (`mmvp:FOLDER`) is no part of the path.

    Args:
        besides: folder of the run, which may lie within one of them.
    """
    found = {}
    for name, value in options.items():
        given = value if isinstance(value, list | tuple) else [value]
        named_paths = [named(each)[1] for each in given if isinstance(each, str | Path) and str(each)]
        paths = [path for path in named_paths if _is_there(path)]
        if paths:
            found[name] = _digest([file for path in paths for file in _files(path, besides.resolve())])
    return found


def _is_there(name: str | Path) -> bool:
    try:
        return bool(str(name)) and Path(name).exists()
    except (OSError, ValueError):
        return False


def _files(path: Path, besides: Path) -> Iterator[tuple[str, Path]]:
    """Files with the names that they have in the digest: within a folder, wherever it lies."""
    if path.is_file():
        yield path.name, path
        yield from _named(path) if path.suffix == ".jsonl" else ()
    elif (path / LINES).is_file():
        yield from _files(path / LINES, besides)
    elif any(path.glob("*config.json")):
        yield from ((each.name, each) for each in sorted(path.iterdir()) if each.is_file())
        base = _base(path / "adapter_config.json")
        yield from _files(base, besides) if base is not None and base != path else ()
    else:
        for each in sorted(path.rglob("*")):
            if each.is_file() and not each.resolve().is_relative_to(besides):
                yield str(each.relative_to(path)), each


def _named(lines: Path) -> Iterator[tuple[str, Path]]:
    """The files that the lines of a jsonl name."""
    for line in lines.read_bytes().split(b"\n"):
        try:
            fields = json.loads(line.decode("utf-8-sig"))
        except ValueError:
            continue
        values = fields.values() if isinstance(fields, dict) else ()
        for value in itertools.chain(*(each if isinstance(each, list) else [each] for each in values)):
            if isinstance(value, str) and _is_there(lines.parent / value) and (lines.parent / value).is_file():
                yield value, lines.parent / value


def _base(adapter: Path) -> Path | None:
    """The folder of the model that an adapter belongs to."""
    try:
        named = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Path(named) if isinstance(named, str) and _is_there(named) else None


def _digest(files: list[tuple[str, Path]]) -> str:
    found = hashlib.sha256()
    for name, path in files:
        try:
            content = file_hash(path)
        except OSError:
            # Whoever loads it says so in its own words.
            content = "unreadable"
        found.update(json.dumps([name, content]).encode())
    return found.hexdigest()[:16]
