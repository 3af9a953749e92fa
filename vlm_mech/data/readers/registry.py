"""Which formats there are, and which of them a source is of: `mmvp:FOLDER`, or a folder known by its files."""

import dataclasses
import functools
import importlib
import itertools
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_mech.data import readers
from vlm_mech.data.readers.format import Format, ReaderOptions, Table
from vlm_mech.data.readers.tables import files_in, kind_of, read
from vlm_mech.data.user_files import Row, Rows
from vlm_mech.errors import UsageError

OTHERS = {
    "text": ("training text", "contrastive_tuning --train and frequency --text read it"),
    "classes": ("pictures with a class", "classify takes them"),
}
"""What a format holds that is neither pairs nor items, and what reads it."""
NAMED = re.compile(r"([a-z][a-z0-9-]*):(.+)", re.DOTALL)
HEAD = 100
"""Rows of a table by one of which its format is known, where the first one's values are of none."""
MOST = 4
"""Files that are told one by one."""


@dataclass(frozen=True)
class Source:
    """Files of one format: its folder, and the tables in it."""

    format: Format
    root: Path
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()
    """Files beside them that are not read although they look like it."""

    def rows(self, options: ReaderOptions) -> Rows:
        """Its rows, with the fields of lines of `pairs.jsonl` or `items.jsonl`.

        Raises:
            UsageError: a file that cannot be read.
        """
        found = self.format.rows(self.tables, options)
        return dataclasses.replace(found, notes=(*self.notes, *found.notes)) if self.notes else found


@functools.cache
def formats() -> tuple[Format, ...]:
    """Every format, by name: the `FORMAT` of each module of this folder that has one."""
    names = [each.name for each in pkgutil.iter_modules(readers.__path__)]
    modules = [importlib.import_module(f"{readers.__name__}.{name}") for name in names]
    found = [module.FORMAT for module in modules if hasattr(module, "FORMAT")]
    return tuple(sorted(found, key=lambda each: each.name))


def named(source: str | Path) -> tuple[Format | None, Path]:
    """The format that a source names before a colon, if it names one, and its path."""
    known = {each.name: each for each in formats()}
    found = NAMED.fullmatch(str(source))
    if found and found[1] in known:
        return known[found[1]], Path(found[2])
    return None, Path(source)


def find_source(name_or_path: str | Path, *, others: bool = False) -> Source | None:
    """The source that a name or a path means; None where it is of no format.

    Args:
        others: whether it may hold neither pairs nor items: training text, or pictures with a class.

    Raises:
        UsageError: a format is named and the files are not of it, the files may be of several, or they hold something
            else than pairs and items where that is not wanted.
    """
    found = _found(name_or_path)
    if found is not None and found.format.holds in OTHERS and not others:
        what, who = OTHERS[found.format.holds]
        raise UsageError(
            f"data {str(name_or_path)!r:.200} holds {what} ({found.format.name}), neither pairs nor items; {who}"
        )
    return found


def _found(name_or_path: str | Path) -> Source | None:
    asked, path = named(name_or_path)
    if asked is not None and not _exists(path):
        raise UsageError(f"{asked.name}: there is no folder or file {str(path)!r:.200}")
    if not _exists(path):
        return None
    tables, unread = files_in(path)
    root = tables[0].root if tables else path if path.is_dir() else path.parent
    if asked is not None:
        fitting = tuple(each for each in tables if is_of(asked, each))
        if not fitting:
            told = unread_notes(unread) if unread and not _nearest(asked, tables) else [_lacking(asked, tables)]
            raise UsageError(f"{str(path)!r:.200} holds no file of the format {asked.name}: {'; '.join(told)}")
        return Source(asked, root, fitting, strays(asked, fitting, tables, unread))
    known_by_files = [each for each in formats() if each.known_by_files]
    found = [(each, tuple(table for table in tables if is_of(each, table))) for each in known_by_files]
    known = [(each, fitting) for each, fitting in found if fitting]
    if len(known) > 1:
        names = ", ".join(f"{each.name} ({fitting[0].path.name})" for each, fitting in known)
        raise UsageError(
            f"{str(path)!r:.200} may be read as {names}; name one, as in {known[0][0].name}:{str(path)!s:.200}"
        )
    return None if not known else Source(known[0][0], root, known[0][1], strays(*known[0], tables, unread))


def names_of_formats() -> str:
    """Names that may stand before the colon, in one line."""
    return ", ".join(each.name for each in formats())


def known_in(folder: Path) -> list[tuple[Path, str]]:
    """The first table of each format that lies in a folder itself, and the name of the format."""
    tables, _ = files_in(folder, depth=0)
    known = (each for each in formats() if each.known_by_files)
    found = ((each, next((table.path for table in tables if is_of(each, table)), None)) for each in known)
    return [(path, each.name) for each, path in found if path is not None]


def unread_notes(unread: dict[str, str]) -> list[str]:
    """What is told of files that cannot be read."""
    return [f"{name} is not read: {reason}" for name, reason in unread.items()]


def is_of(asked: Format, table: Table) -> bool:
    """Whether a table is of a format, by the columns and values of one of its first rows."""
    if asked.reads(table):
        return True
    if not table.first or _shared(asked, table) < 0.5:
        return False
    rows = itertools.islice(read(table), HEAD)
    alone = (
        dataclasses.replace(table, columns=tuple(each.fields), first=each.fields)
        for each in rows
        if isinstance(each, Row)
    )
    try:
        return any(asked.reads(each) for each in alone)
    except UsageError:
        return False


def strays(asked: Format, fitting: Sequence[Table], tables: Sequence[Table], unread: dict[str, str]) -> tuple[str, ...]:
    """What is told of files beside those of a format: that they cannot be read, or are nearly of it.

    Nearly of it is a table that has half of its columns, or lies in the same folder with the same suffix; one of
    another format is not.
    """
    places = {(table.path.parent, kind_of(table.path)) for table in fitting}
    found = unread_notes(unread)
    for table in tables:
        if table in fitting or any(is_of(each, table) for each in formats()):
            continue
        if _shared(asked, table) >= 0.5 or (table.path.parent, kind_of(table.path)) in places:
            found.append(f"{table.name} is not read: it {_what_lacks(asked, table)}")
    return (*found[:MOST], *([f"and {len(found) - MOST} files more are not read"] if len(found) > MOST else []))


def near_misses(path: Path) -> tuple[str, ...]:
    """What is told of files that are of no format: that they cannot be read, or are nearly of one."""
    if not _exists(path):
        return ()
    tables, unread = files_in(path)
    found = unread_notes(unread)
    for table in tables:
        nearest = max(formats(), key=lambda each: _shared(each, table))
        if _shared(nearest, table) >= 0.5:
            found.append(f"{table.name} is nearly of the format {nearest.name}, but {_what_lacks(nearest, table)}")
    return tuple(found[:MOST])


def _shared(asked: Format, table: Table) -> float:
    """The share of the columns of a format that a table has."""
    return len(set(asked.columns) & set(table.columns)) / len(asked.columns)


def _what_lacks(asked: Format, table: Table) -> str:
    missing = [column for column in asked.columns if column not in table.columns]
    if missing:
        return f"has no column {missing[0]!r}, only {', '.join(table.columns):.200}"
    return "has these columns with other values"


def _nearest(asked: Format, tables: Sequence[Table]) -> Table | None:
    """The table that has most of the columns of a format, if one has any."""
    nearest = max(tables, key=lambda table: _shared(asked, table), default=None)
    return nearest if nearest is not None and _shared(asked, nearest) else None


def _lacking(asked: Format, tables: Sequence[Table]) -> str:
    """What the table that comes nearest lacks, or what is needed."""
    nearest = _nearest(asked, tables)
    if nearest is None:
        return f"needed is {asked.layout}"
    told = f"{nearest.path.name} {_what_lacks(asked, nearest)}"
    return told if set(asked.columns) - set(nearest.columns) else f"{told}; needed is {asked.layout}"


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that cannot be one names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _exists(path: Path) -> bool:
    """Whether there is such a folder or file; devices and pipes are neither."""
    try:
        return path.is_dir() or path.is_file()
    except (OSError, ValueError):
        return False
