"""Where pairs and items come from: a file of the user's own, an official format, or the hub; which one a name means."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm_mech.data.given_rows import rows_given
from vlm_mech.data.hub import holds_classes, hub_data, is_of_hub
from vlm_mech.data.json_lines import read_rows
from vlm_mech.data.readers.format import ReaderOptions
from vlm_mech.data.readers.registry import Source, find_source, formats, is_file, is_of, known_in, named, near_misses
from vlm_mech.data.user_files import Rows, with_own_ids
from vlm_mech.errors import UsageError

Holds = Literal["pairs", "items"]
OWN: dict[str, Holds] = {"pairs.jsonl": "pairs", "items.jsonl": "items"}
"""Files of the user's own, and what they hold."""
NEEDED: dict[Holds, tuple[tuple[str, ...], ...]] = {
    "pairs": (
        ("image", "images", "counterfactual_question"),
        ("counterfactual_image", "counterfactual_images", "counterfactual_question"),
        ("question",),
        ("answer",),
        ("counterfactual_answer",),
    ),
    "items": (("image", "images"), ("question",), ("answer",)),
}
"""Fields without which a row is none, each by either of its names."""
MOST = 8


@dataclass(frozen=True)
class Found:
    """What a name means: what it holds and is called, how it is read, and the folder from which pictures are named."""

    holds: Holds
    kind: str
    """The name of a format, or `pairs.jsonl`, `items.jsonl`, whose fields the rows have."""
    told: str
    """The same with its files, for people."""
    place: str
    """What errors call it."""
    folder: Path
    read: Callable[[ReaderOptions], Rows]

    def rows(self, options: ReaderOptions) -> Rows:
        """Its rows; of those with one id, where ids are known, the first.

        Raises:
            UsageError: it cannot be read, or more than half of the rows have the id of another.
        """
        return with_own_ids(self.read(options), self.place)

    @property
    def is_own(self) -> bool:
        """Whether it is a file of the user's own."""
        return self.kind in OWN and not is_of_hub(self.place)


def check_named(given: Any) -> None:
    """Raises `UsageError` for what is not a name of data and no path, such as the rows themselves."""
    if not isinstance(given, str | Path):
        raise UsageError(
            f"data are named by a text or a path, and a {type(given).__name__} was given; Pairs.from_rows and "
            "Items.from_rows take rows (dicts, a DataFrame, a datasets.Dataset), as_pairs takes Items"
        )


def find_data(name_or_path: str | Path) -> Found | None:
    """What a name or a path means; None where it is neither a file of the user's own nor of a format.

    `pairs.jsonl` and `items.jsonl` may be given themselves, or their folder. A data set of the hub (`hf:NAME`) is known
    by its columns: those of a format, or the fields of these files.

    Raises:
        UsageError: a folder holds several, none of which is named; or a data set of the hub has other columns.
    """
    check_named(name_or_path)
    if is_of_hub(name_or_path):
        return _of_hub(str(name_or_path))
    path = Path(name_or_path)
    if named(name_or_path)[0] is None and (own := _own_files(path)):
        beside = "" if is_file(path) else _beside(path, own)
        if beside:
            raise UsageError(f"{str(path)!r:.200} holds {beside}; name one, as in {own[0]}")
        return _own(own[0])
    source = find_source(name_or_path)
    if source is None or source.format.holds not in OWN.values():
        return None
    files = [table.path.name for table in source.tables]
    more = f" and {len(files) - MOST} more" if len(files) > MOST else ""
    told = f"format {source.format.name} ({', '.join(files[:MOST])}{more})"
    return Found(source.format.holds, source.format.name, told, str(name_or_path), source.root, source.rows)


def _of_hub(name: str) -> Found:
    given = hub_data(name)
    fitting = [each for each in formats() if each.known_by_files and is_of(each, given.table)]
    table = given.table
    about = f"({table.path.name}, {len(given.data)} rows)"
    if len(fitting) > 1:
        names = ", ".join(each.name for each in fitting)
        raise UsageError(
            f"data set {name!r} has columns of several formats: {names}; save it as the file of one of them"
        )
    if fitting:
        source = Source(fitting[0], table.root, (table,))
        told = f"format {source.format.name} {about}"
        return Found(source.format.holds, source.format.name, told, name, table.root, source.rows)
    rows = rows_given(given.data, name)
    for file, holds in OWN.items():
        if all(any(each in given.columns for each in either) for either in NEEDED[holds]):
            return Found(holds, file, f"rows with the fields of {file} {about}", name, table.root, lambda options: rows)
    needed = "; ".join(f"{holds} need {', '.join(each[0] for each in either)}" for holds, either in NEEDED.items())
    classes = " (images with a class, which classify reads)" if holds_classes(name) else ""
    raise UsageError(
        f"data set {name!r} has the columns {', '.join(given.columns):.200}{classes}; {needed}, and formats their own "
        "(docs/data.md)"
    )


def what_is_there(name_or_path: str | Path) -> str:
    """What is told of the files of a folder of no format, to end an error; nothing where none is like one."""
    return "".join(f"; {each}" for each in near_misses(named(name_or_path)[1]))


def _own(file: Path) -> Found:
    kind = file.name.lower()
    what = OWN[kind]
    return Found(what, kind, kind, str(file), file.parent, lambda options: read_rows(file, what))


def _own_files(path: Path) -> list[Path]:
    """The files of the user's own that a path means."""
    if is_file(path):
        return [path] if path.name.lower() in OWN else []
    try:
        return sorted(each for each in path.iterdir() if each.name.lower() in OWN and each.is_file())[::-1]
    except (OSError, ValueError):
        return []


def _beside(folder: Path, own: list[Path]) -> str:
    """What a folder itself holds, if that is more than one file of the user's own."""
    others = [f"{file.name} ({format})" for file, format in known_in(folder) if file not in own]
    names = [*(each.name for each in own), *others]
    return " and ".join(names) if len(names) > 1 else ""
