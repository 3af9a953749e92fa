"""Rows in memory: every kind of table and of picture, read lazily."""

import base64
import json

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.data.readers.made import content, save, shown
from tests.helpers import as_folder
from tests.zoo.tiny import picture
from vlm_mech import Items, Pairs, UsageError, load_items, load_pairs
from vlm_mech.data import row_fields
from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.wording import Wording

FORMS = {
    "pil": picture,
    "array": lambda number: np.asarray(picture(number)),
    "bytes": content,
    "base64": lambda number: base64.b64encode(content(number)).decode(),
    "mapping": lambda number: {"bytes": content(number), "path": None},
}


def pair_rows(n, form=content):
    return [
        {
            "id": f"p{at}", "image": form(at), "counterfactual_image": form(at + 50), "question": "what?",
            "answer": "red", "counterfactual_answer": "blue", "options": ["blue", "red"], "conflict": "second",
        }
        for at in range(n)
    ]  # fmt: skip


def item_rows(n, form=content):
    return [{"image": form(at), "question": f"what is {at}?", "answer": "red"} for at in range(n)]


@pytest.mark.parametrize("form", FORMS)
def test_pictures_in_every_form(form, tmp_path):
    pairs = Pairs.from_rows(pair_rows(3, FORMS[form]))
    assert [tuple(map(shown, pair.pictures)) for pair in pairs] == [(0, 50), (1, 51), (2, 52)]
    assert pairs[0].options == ("blue", "red") and pairs[0].conflict == "second"
    assert pairs.digest == load_pairs(as_folder(tmp_path / "pairs", pairs)).digest
    items = Items.from_rows(item_rows(3, FORMS[form]))
    assert [shown(item.image) for item in items] == [0, 1, 2] and [item.id for item in items] == ["1", "2", "3"]


def test_pairs_are_loaded_from_what_people_hold(tmp_path):
    """Rows in memory, and the file itself in place of its folder."""
    rows = pair_rows(3)
    pairs, folder = Pairs.from_rows(rows), tmp_path / "pairs"
    as_folder(folder, pairs)
    for given in (rows, pd.DataFrame(rows), datasets.Dataset.from_list(rows), folder / "pairs.jsonl"):
        assert load_pairs(given).digest == pairs.digest
        assert len(load_pairs(given, n=2)) == 2
    for given, told in ((pairs, "which need no loading"), ({"a": 1}, "dict")):
        with pytest.raises(UsageError, match=told):
            load_pairs(given)


def test_paths_go_out_from_the_folder_and_addresses_are_fetched_once(tmp_path, monkeypatch):
    save(tmp_path / "a.png", 4)
    fetched = []

    def fetch(image):
        if str(image).startswith("http"):
            fetched.append(image)
            return picture(5)
        return load_image(image)

    monkeypatch.setattr(row_fields, "load_image", fetch)
    rows = [
        {"image": where, "question": "q", "answer": "a"} for where in ("a.png", tmp_path / "a.png", "http://x/b.png")
    ]
    items = Items.from_rows(rows, folder=tmp_path)
    assert [shown(item.image) for item in items] == [4, 4, 5] and fetched == ["http://x/b.png"]


def tables(rows):
    """The same rows as every kind of table."""
    made = datasets.Dataset.from_list([{key: row[key] for key in row if key != "image"} for row in rows])
    pictures = datasets.Dataset.from_dict(
        {"image": [{"bytes": row["image"], "path": None} for row in rows]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    hub = datasets.concatenate_datasets([made, pictures], axis=1)
    frame = pd.DataFrame(rows)
    return {"list": rows, "frame": frame, "hub": hub, "stream": hub.to_iterable_dataset(), "generator": iter(rows)}


@pytest.mark.parametrize("kind", ["list", "frame", "hub", "stream", "generator"])
def test_every_kind_of_table_gives_the_same_items(kind):
    rows = item_rows(4)
    rows[0] |= {"options": None, "category": None}
    rows[1] |= {"options": ["blue", "red"], "category": "legs"}
    items = Items.from_rows(tables(rows)[kind], name="mine", wording=Wording("{question} One word."))
    expected = Items.from_rows(rows, wording=Wording("{question} One word."))
    assert items.digest == expected.digest and items.name == "mine"
    assert items[1].options == ("blue", "red") and items[1].category == "legs" and items[0].category is None
    assert items[0].prompt.question == "what is 0? One word."


@pytest.mark.parametrize("kind", ["list", "frame", "hub", "stream", "generator"])
def test_of_many_rows_only_the_chosen_pictures_are_decoded(kind, monkeypatch):
    """Counted where Pillow opens a file: 5 of 200 rows; a row without a picture is replaced by another."""
    rows = item_rows(200, lambda at: content(at % 50))
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *given, **named: (opened.append(1), real(*given, **named))[1])
    items = Items.from_rows(tables(rows)[kind], n=5, seed=3)
    assert len(items) == 5 and len(opened) == 5
    numbers = [int(item.id) for item in items]
    assert numbers == sorted(numbers)
    if kind in ("stream", "generator"):
        assert numbers == [1, 2, 3, 4, 5] and items.drawn == "the first 5 rows of a stream that could be used"
    else:
        assert numbers != [1, 2, 3, 4, 5] and items.drawn == "5 of 200 rows, drawn with seed 3"


@pytest.mark.usefixtures("untyped")
def test_rows_are_fetched_when_they_are_drawn():
    """20,000 rows, 50 of which are made."""
    made = []

    class Rows:
        def __len__(self):
            return 20_000

        def __iter__(self):
            raise AssertionError("all rows are asked for")

        def __getitem__(self, at):
            made.append(at)
            return {"image": content(at % 7), "question": "q", "answer": "a"}

    assert len(Items.from_rows(Rows(), n=50)) == 50 and len(made) == 50
    made.clear()

    def stream():
        for at in range(20_000):
            made.append(at)
            yield {"image": content(at % 7) if at else None, "question": "q", "answer": "a"}

    items = Items.from_rows(stream(), n=50)
    assert len(items) == 50 and len(made) == 51 and items.refused[0].id == "1"


def test_the_same_rows_are_drawn_from_memory_as_from_a_file(tmp_path):
    rows = item_rows(30, FORMS["base64"])
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Items.from_rows(rows, n=7, seed=5).digest == load_items(tmp_path, n=7, seed=5).digest


@pytest.mark.usefixtures("untyped")
def test_what_has_no_rows_is_one_line():
    for given, what in (("x.jsonl", "str"), ({"image": 1}, "dict"), (3, "int")):
        with pytest.raises(UsageError, match=f"Items.from_rows takes rows, not a {what}: a list of dicts"):
            Items.from_rows(given)
    with pytest.raises(UsageError, match="row 1 is a int; a mapping of image, question, answer is needed"):
        Pairs.from_rows([1, 2])
    with pytest.raises(UsageError, match="'rows' holds no usable pair; the first was refused because row 1: image is"):
        Pairs.from_rows([{"question": "q"}])
    told = "a: row 2: its id 'a' is that of row 1; each needs one of its own, or none"
    assert [each.told for each in Pairs.from_rows([row | {"id": "a"} for row in pair_rows(2)]).refused] == [told]
    with pytest.raises(UsageError, match="n is 0; at least one item is needed"):
        Items.from_rows([], n=0)


@pytest.mark.usefixtures("untyped")
def test_what_is_missing_in_any_way_is_missing_and_what_is_no_text_is_refused():
    shown = {"image": picture(1), "question": "what is it?", "answer": "a"}
    missing = {"prior": np.float32("nan"), "group": np.datetime64("NaT"), "category": float("nan")}
    (item,) = Items.from_rows([shown | missing])
    assert (item.prior, item.group, item.category) == (None, None, None)
    (item,) = Items.from_rows([shown | {"options": np.array(["a", "b"]), "conflict": np.bool_(True)}])
    assert item.options == ("a", "b") and item.conflict
    assert Items.from_rows([shown | {"options": pd.Series(["b", "a"])}])[0].options == ("b", "a")
    odd = {"prior": ["p"], "category": {"a": 1}, "group": True, "options": "", "conflict": np.array([1, 0])}
    items = Items.from_rows([shown, *(shown | {name: value} for name, value in odd.items())])
    assert len(items) == 1 and len(items.refused) == len(odd)
    assert all(name in each.reason for name, each in zip(odd, items.refused, strict=True))
