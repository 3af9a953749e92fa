"""How exported data sets are written: pictures, tables, and scenes in which two things lie in every relation."""

import base64
import csv
import dataclasses
import io
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_mech.data.render import render
from vlm_mech.data.scenes import COLOURS, PRIORS, SHAPES, SIZE, Scene, Thing
from vlm_mech.errors import UsageError

RELATIONS = {
    "on": "A {x} on a {y}",
    "under": "A {x} under a {y}",
    "left_of": "A {x} to the left of a {y}",
    "right_of": "A {x} to the right of a {y}",
    "in-front_of": "A {x} in front of a {y}",
    "behind": "A {x} behind a {y}",
}
"""Relations as What'sUp names pictures, and its captions."""
AWAY = {"on": (0, -1), "under": (0, 1), "left_of": (-1, 0), "right_of": (1, 0), "in-front_of": (0, 0), "behind": (0, 0)}
"""In which direction the first thing lies from the second."""


def content(scene: Scene) -> bytes:
    """The scene as a PNG file."""
    buffer = io.BytesIO()
    render(scene).save(buffer, "PNG")
    return buffer.getvalue()


def in_base64(scene: Scene) -> str:
    """The scene as a PNG file in base64."""
    return base64.b64encode(content(scene)).decode()


def save(path: Path, scene: Scene) -> None:
    """Writes the scene as a PNG file, whatever the official name ends in, so that no pixel changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content(scene))


def write_json(path: Path, rows: Sequence[Any]) -> None:
    """Writes a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    """Writes JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_cells(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, delimiter: str = ",") -> None:
    """Writes a csv or tsv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([columns, *rows])


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a parquet file with pictures as the hub has them; `Scene` cells become pictures."""
    import pyarrow as pa
    from pyarrow import parquet

    made = [
        {
            name: {"bytes": content(cell), "path": None} if isinstance(cell, Scene) else cell
            for name, cell in row.items()
        }
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = {name for row in rows for name, cell in row.items() if isinstance(cell, Scene)}
    columns = {
        name: pa.array([row.get(name) for row in made], type=picture if name in pictures else pa.string())
        for name in dict.fromkeys(itertools.chain(*made))
    }
    parquet.write_table(pa.table(columns), path, row_group_size=16)


def related(relations: Sequence[str], n: int, *, seed: int) -> Iterator[dict[str, Scene]]:
    """Scenes of n groups: two things, of kinds that no other group has in this order, in each of the relations.

    No scene is one that the embedded models were trained on.

    Raises:
        UsageError: more groups than there are two kinds.
    """
    rng = random.Random(f"related/{'/'.join(relations)}/{seed}")
    known = list(itertools.permutations((*SHAPES, *PRIORS), 2))
    if n > len(known):
        raise UsageError(f"{n} groups were requested; there are {len(known)} of two kinds each")
    kinds = rng.sample(known, n)
    for first, second in kinds:
        colours = rng.sample(list(COLOURS), 2)
        free = [PRIORS.get(kind, colour) for kind, colour in zip((first, second), colours, strict=True)]
        things = [Thing(kind, (colour,), "large", 0, 0) for kind, colour in zip((first, second), free, strict=True)]
        background = rng.randint(205, 250)
        while True:
            grain = rng.getrandbits(32)
            made = {each: Scene(_placed(things, each), background, grain) for each in relations}
            if all(scene.split != "train" for scene in made.values()):
                break
        yield made


def _placed(things: Sequence[Thing], relation: str) -> tuple[Thing, ...]:
    """The things apart in a direction, or overlapping with the front one drawn last."""
    across, down = AWAY[relation]
    away = 20 if across or down else 7
    dx, dy = (away * across, away * down) if across or down else (away, 0)
    middle = SIZE // 2
    first = dataclasses.replace(things[0], x=middle + dx, y=middle + dy)
    second = dataclasses.replace(things[1], x=middle - dx, y=middle - dy)
    return (second, first) if relation == "in-front_of" else (first, second)
