"""Which formats there are, and which of them a source is of: `mmvp:FOLDER`, or a folder known by its files."""

import functools
import importlib
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path

from vlm_mech.data import readers
from vlm_mech.data.readers.format import Format, ReaderOptions, Table
from vlm_mech.data.readers.tables import tables_in
from vlm_mech.data.user_files import Rows
from vlm_mech.errors import UsageError

OTHERS = {
    "text": ("training text", "contrastive_tuning --train and frequency --text read it"),
    "classes": ("pictures with a class", "classify takes them"),
}
"""What a format holds that is neither pairs nor items, and what reads it."""
NAMED = re.compile(r"([a-z][a-z0-9-]*):(.+)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """Files of one format: its folder, and the tables in it."""

    format: Format
    root: Path
    tables: tuple[Table, ...]

    def rows(self, options: ReaderOptions) -> Rows:
        """Its rows, with the fields of lines of `pairs.jsonl` or `items.jsonl`.

        Raises:
            UsageError: a file that cannot be read.
        """
        return self.format.rows(self.tables, options)


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
    tables = tables_in(path)
    root = path if path.is_dir() else path.parent
    if asked is not None:
        fitting = tuple(each for each in tables if asked.reads(each))
        if not fitting:
            raise UsageError(f"{str(path)!r:.200} holds no file of the format {asked.name}: {_lacking(asked, tables)}")
        return Source(asked, root, fitting)
    found = [(each, tuple(table for table in tables if each.reads(table))) for each in formats()]
    known = [(each, fitting) for each, fitting in found if fitting]
    if len(known) > 1:
        names = ", ".join(f"{each.name} ({fitting[0].path.name})" for each, fitting in known)
        raise UsageError(
            f"{str(path)!r:.200} may be read as {names}; name one, as in {known[0][0].name}:{str(path)!s:.200}"
        )
    return Source(known[0][0], root, known[0][1]) if known else None


def names_of_formats() -> str:
    """Names that may stand before the colon, in one line."""
    return ", ".join(each.name for each in formats())


def _lacking(asked: Format, tables: tuple[Table, ...]) -> str:
    """What the table that comes nearest lacks, or what is needed."""
    nearest = max(tables, key=lambda table: len(set(asked.columns) & set(table.columns)), default=None)
    if nearest is None or not set(asked.columns) & set(nearest.columns):
        return f"needed is {asked.layout}"
    missing = [column for column in asked.columns if column not in nearest.columns]
    if missing:
        return f"{nearest.path.name} has no column {missing[0]!r}, only {', '.join(nearest.columns):.200}"
    return f"{nearest.path.name} has these columns with other values; needed is {asked.layout}"


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that cannot be one names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
