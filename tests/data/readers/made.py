"""Tiny data sets in the official layouts: generated pictures and invented rows."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from tests.zoo.tiny import picture
from vlm_mech.inputs.image import load_image


def save(path: Path, number: int) -> Path:
    """The picture of a number, as a PNG whatever the file is called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path, "PNG")
    return path


def content(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def write_csv(path: Path, columns: tuple[str, ...], *rows: tuple, delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([columns, *rows])
    return path


def write_json(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


WORDS = {
    "on": "A {} on a {}", "under": "A {} under a {}", "left_of": "A {} to the left of a {}",
    "right_of": "A {} to the right of a {}", "in-front_of": "A {} in front of a {}", "behind": "A {} behind a {}",
}  # fmt: skip
SETS = {
    "controlled_images": ("on", "under", "left_of", "right_of"),
    "controlled_clevr": ("left_of", "right_of", "in-front_of", "behind"),
}


def whatsup(folder: Path, things: tuple[tuple[str, str], ...] = (("beer bottle", "armchair"),)) -> Path:
    """Both parts: of each two things a picture in every relation of the part; pictures are numbered in this order."""
    number = 0
    for name, relations in SETS.items():
        rows = []
        for x, y in things:
            captions = {relation: WORDS[relation].format(x, y) for relation in relations}
            for relation in relations:
                number += 1
                path = f"data/{name}/{x.replace(' ', '-')}_{relation}_{y.replace(' ', '-')}.jpeg"
                save(folder / path, number)
                wrong = [captions[other] for other in relations if other != relation]
                rows.append({"image_path": path, "caption_options": [captions[relation], *wrong]})
        write_json(folder / "data" / f"{name}_dataset.json".replace("images_", "images_"), rows)
    return folder


MMVP = ("Index", "Question", "Options", "Correct Answer")


def mmvp(folder: Path, rows: list[tuple]) -> Path:
    """Rows with the pictures of their numbers."""
    write_csv(folder / "Questions.csv", MMVP, *rows)
    for row in rows:
        if str(row[0]).isdecimal():
            save(folder / "MMVP Images" / f"{row[0]}.jpg", int(row[0]))
    return folder


def write_parquet(path: Path, rows: list[dict[str, Any]], *, group: int = 2) -> Path:
    """Rows in groups of this many, as large files have them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def held(number: int) -> dict[str, Any]:
    """A picture as the hub's parquet files hold it."""
    return {"bytes": content(number), "path": f"{number}.png"}


def shown(image: Any) -> int:
    """Which of the numbered pictures it is."""
    pixels = load_image(image).tobytes()
    return next(number for number in range(60) if picture(number).tobytes() == pixels)
