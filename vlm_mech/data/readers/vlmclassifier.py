"""Pictures with a class as VLMClassifier has them (arXiv 2405.18415): JSON lines, and a list of the classes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_mech.data.class_names import unique_names
from vlm_mech.data.readers.format import Format, ReaderOptions, Table
from vlm_mech.data.readers.tables import read
from vlm_mech.data.user_files import Refused, Row, Rows
from vlm_mech.errors import UsageError

PARTS = {"train": "train", "valid": "validation", "val": "validation", "validation": "validation", "test": "test"}
"""Parts by what `split` says."""


@dataclass(frozen=True)
class Pictured:
    """A picture, the name of its class, and its part."""

    id: str
    image: Any
    label: str
    part: str


def names_beside(tables: Sequence[Table]) -> tuple[str, ...]:
    """The names in `*_classes.json` beside the tables, in their order; none where there is no such file.

    Raises:
        UsageError: several such files, or one that is no list of texts.
    """
    found = sorted({path for table in tables for path in table.path.parent.glob("*_classes.json")})
    own = [path for path in found for table in tables if path.name == f"{table.path.stem}_classes.json"]
    found = own or found
    if not found:
        return ()
    if len(found) > 1:
        told = ", ".join(path.name for path in found)
        raise UsageError(f"there are several lists of classes, {told}; name the file of pictures that is meant")
    try:
        names = json.loads(found[0].read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UsageError(f"classes {str(found[0])!r} cannot be read: {error}") from error
    names = list(names.values()) if isinstance(names, dict) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"classes {str(found[0])!r} is not a list of names")
    return tuple(names)


def pictured(tables: Sequence[Table]) -> Iterator[Pictured | Refused]:
    """The pictures of the tables in their order; a number as label is the place of the name in the list of classes.

    Numbers tell classes of one name apart (`unique_names`); names as labels cannot.
    """
    names = names_beside(tables)
    numbered = unique_names(names)
    for table in tables:
        for row in read(table):
            if isinstance(row, Refused):
                yield row
                continue
            try:
                yield _pictured(row, table, names, numbered, len(tables) > 1)
            except UsageError as error:
                yield Refused(row.place, str(error))


def _pictured(row: Row, table: Table, names: tuple[str, ...], numbered: list[str], several: bool) -> Pictured:
    label, split = row.fields.get("label"), str(row.fields.get("split", "")).lower()
    if isinstance(label, int) and not isinstance(label, bool):
        if not 0 <= label < len(names):
            raise UsageError(f"{row.place}: label is {label}; the list of classes has {len(names)} names")
        label = numbered[label]
    elif not isinstance(label, str) or not label.strip() or (names and label not in names):
        raise UsageError(f"{row.place}: label is {label!r:.60}, which is not a name of a class")
    if split not in PARTS:
        raise UsageError(f"{row.place}: split is {split!r:.60}; train, valid or test is needed")
    name = f"{table.path.stem}/{row.id}" if several else row.id
    return Pictured(name, table.picture(row.fields.get("image"), "images"), label, PARTS[split])


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The pictures as rows with `image`, `label` and `part`, those that are none refused."""
    kept, refused = [], {}
    for number, each in enumerate(pictured(tables), 1):
        if isinstance(each, Refused):
            refused[number] = each
        else:
            kept.append(Row(number, each.id, {"image": each.image, "label": each.label, "part": each.part}))
    return Rows(tuple(kept), refused)


FORMAT = Format(
    name="vlmclassifier",
    holds="classes",
    columns=("image", "label", "split"),
    rows=rows,
    layout="JSON lines with `image`, `label` (the name of the class, or its number), `split` (train, valid or test); "
    "beside them `{name}_classes.json`, a list of the names",
    becomes="pictures with a class for `classify`; a part that is missing is dealt out of the training part",
    fits=lambda table: str(table.first.get("split", "")).lower() in PARTS,
)
