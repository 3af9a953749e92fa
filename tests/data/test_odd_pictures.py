"""Pictures as they come: each kind is shown as it is meant, or is counted out with its reason, on one line each."""

import json
import re
import tracemalloc
import warnings

import numpy as np
import pytest
from PIL import Image

from experiments import layer_swap
from tests.data.readers.made import mmvp, write_lines
from tests.data.test_user_files import encoded
from tests.helpers import command
from tests.zoo.tiny import picture
from vlm_mech.data.items import Items, load_items
from vlm_mech.inputs.image import load_image

ASK = {"question": "what?", "answer": "red"}
ROWS = [(number, "Is it open?", "(a) Open (b) Closed", f"({right})") for number, right in ((1, "a"), (2, "b"))]


def palette():
    return picture(1).quantize(16)


def saved(path, image, **options):
    image.save(path, **options)
    return path


SHOWN = {
    "cmyk.jpg": lambda path: saved(path, picture(1).convert("CMYK")),
    "palette.png": lambda path: saved(path, palette(), transparency=bytes(range(0, 256, 16))),
    "palette of one clear colour.png": lambda path: saved(path, palette(), transparency=0),
    "still.gif": lambda path: saved(path, palette()),
    "still.webp": lambda path: saved(path, picture(1), lossless=True),
    "see-through.png": lambda path: saved(path, picture(1).convert("RGBA")),
    "grey.png": lambda path: saved(path, picture(1).convert("LA")),
    "black and white.png": lambda path: saved(path, picture(1).convert("1")),
}
REFUSED = {
    "moving.gif": (lambda path: saved(path, palette(), save_all=True, append_images=[picture(2)]), "has 2 frames"),
    "moving.webp": (lambda path: saved(path, picture(1), save_all=True, append_images=[picture(2)]), "has 2 frames"),
    "deep.png": (lambda path: saved(path, Image.fromarray(np.full((9, 9), 40_000, np.uint16))), "has I;16 values"),
    "cut.png": (lambda path: path.write_bytes(saved(path, picture(1)).read_bytes()[:-90]), "is truncated"),
    "cut.jpg": (lambda path: path.write_bytes(saved(path, picture(1)).read_bytes()[:-90]), "is truncated"),
    "empty.png": (lambda path: path.write_bytes(b""), "cannot be read: it is empty"),
    "page.jpg": (lambda path: path.write_text("<html>404</html>"), "it is in no format that Pillow knows"),
    "folder.png": (lambda path: path.mkdir(), "does not exist"),
    "none.png": (lambda path: None, "does not exist"),
    "http://127.0.0.1:9/none.png": (lambda path: None, "cannot be fetched: "),
}


def test_pictures_of_every_kind_are_shown_or_counted_out(tmp_path, capfd):
    for name, make in SHOWN.items():
        make(tmp_path / name)
    for name, (make, _) in REFUSED.items():
        make(tmp_path / name)
    rows = [{"id": name, "image": name, "question": f"{name}?", "answer": "red"} for name in (*SHOWN, *REFUSED)]
    write_lines(tmp_path / "items.jsonl", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        items = load_items(tmp_path)
        sizes = {load_image(item.image).size for item in items}
    assert [item.id for item in items] == list(SHOWN) and sizes == {picture(1).size}
    for each, (name, (_, said)) in zip(items.refused, REFUSED.items(), strict=True):
        assert each.id == name and said in each.reason and "\n" not in each.reason
    command(layer_swap, "--describe", "--data", tmp_path)
    told = capfd.readouterr()
    assert not told.err and f"cannot be used: {len(REFUSED)}\n" in told.out


def test_a_palette_keeps_its_colours_and_a_turned_picture_stands_upright(tmp_path):
    plain = palette().convert("RGB").tobytes()
    for name in list(SHOWN)[1:3]:
        assert load_image(SHOWN[name](tmp_path / name)).tobytes() == plain
    wide, exif = picture(1).resize((40, 20)), Image.Exif()
    exif[0x0112] = 6
    assert load_image(saved(tmp_path / "turned.jpg", wide, exif=exif)).size == (20, 40)


def test_a_path_in_a_mapping_goes_out_from_the_folder_like_any_other(tmp_path):
    picture(3).save(tmp_path / "3.png")
    write_lines(tmp_path / "items.jsonl", [ASK | {"image": {"bytes": None, "path": "3.png"}}])
    for items in (load_items(tmp_path), Items.from_rows([ASK | {"image": {"path": "3.png"}}], folder=tmp_path)):
        assert load_image(items[0].image).tobytes() == picture(3).tobytes()


def test_pictures_in_lines_of_a_large_file_stay_there(tmp_path):
    """200 lines of 0.2 MB each: 40 MB in the file, of which a line at a time is held, and the few that are drawn."""
    with (tmp_path / "items.jsonl").open("w") as file:
        for number in range(200):
            # Spaces in base64 do not count, as in files with lines of 76 characters.
            line = ASK | {"id": f"q{number}", "image": encoded(number) + " " * 200_000}
            file.write(json.dumps(line | {"question": f"number {number}?"}) + "\n")
    assert (tmp_path / "items.jsonl").stat().st_size > 40e6
    tracemalloc.start()
    items = load_items(tmp_path, n=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(items) == 10 and items.drawn == "10 of 200 rows, drawn with seed 0" and peak < 8e6
    assert all(item.question == f"number {item.id[1:]}?" for item in items)
    assert load_image(items[0].image).tobytes() == picture(int(items[0].id[1:])).tobytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("Is it", "Wäre es").encode("latin-1"), r"it is not UTF-8 \(byte 0xe4\)"),
        (lambda text: text.replace("\r\n", "\r").encode(), "its lines end in carriage returns alone"),
        (lambda text: text.replace(",", ";").encode(), "its first line is split by ';'; cells of a .csv are split"),
        (lambda text: text.encode() + b"\0\0", r"it is not UTF-8 text \(it holds zero bytes\)"),
        (lambda text: b"", "it is empty"),
    ],
    ids=["latin-1", "carriage returns", "semicolons", "zeros", "empty"],
)
def test_a_table_that_cannot_be_read_is_told_however_it_is_asked_for(tmp_path, capsys, change, said):
    """Also where the pictures beside it lie in a folder, which would be one of a class."""
    folder = mmvp(tmp_path, ROWS)
    table = folder / "Questions.csv"
    table.write_bytes(change(table.read_bytes().decode()))
    for data in (folder, f"mmvp:{folder}"):
        assert command(layer_swap, "--describe", "--data", data) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and re.search(f"Questions.csv is not read: (after byte [0-9]+: )?{said}", error)


def test_a_table_without_rows_says_so(tmp_path, capsys):
    table = mmvp(tmp_path, ROWS) / "Questions.csv"
    table.write_text(table.read_text().splitlines()[0])
    assert command(layer_swap, "--describe", "--data", tmp_path) == 2
    assert "holds no usable pair: it has no rows" in capsys.readouterr().err
