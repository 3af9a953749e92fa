"""Data sets of the hub, here local folders that `datasets` reads: known by their columns, read lazily."""

import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from experiments import layer_swap
from tests.data.readers.made import held, shown, write_lines, write_parquet
from tests.helpers import command
from tests.zoo.tiny import picture
from vlm_mech.data import hub
from vlm_mech.data.description import describe
from vlm_mech.data.export.__main__ import export
from vlm_mech.data.image_classes import load_classes
from vlm_mech.data.items import load_items
from vlm_mech.data.masks import pixels_of
from vlm_mech.data.pair_folder import pair_fields
from vlm_mech.data.pairs import load_pairs
from vlm_mech.data.readers.held import Held
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import Image

ASK = {"question": "what?", "answer": "red"}
IMAGE, TEXT = datasets.Image(), datasets.Value("string")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub._loaded.cache_clear()


def made(folder, features, **splits):
    """A folder of parquet files, a split each, with the features of the hub."""
    for split, rows in splits.items():
        data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        (folder / "data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return f"hf:{folder}"


def counted(monkeypatch):
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *given, **named: (opened.append(1), real(*given, **named))[1])
    return opened


def test_rows_with_our_own_fields_are_read_as_they_are_drawn(tmp_path, monkeypatch):
    label = datasets.ClassLabel(names=["red", "blue"])
    features = {"image": IMAGE, "question": TEXT, "answer": label, "id": datasets.Value("float64")}
    rows = [{"image": held(at), "question": "what?", "answer": at % 2, "id": at and at + 0.0} for at in range(20)]
    name = made(tmp_path / "d", features, train=rows[:1], test=rows)
    opened = counted(monkeypatch)
    items = load_items(f"{name}@test", n=4, seed=1)
    assert len(items) == 4 and len(opened) == 4 and items.drawn == "4 of 20 rows, drawn with seed 1"
    assert [item.answer for item in items] == [("red", "blue")[int(item.id) % 2] for item in items]
    assert [shown(item.image) for item in items] == [int(item.id) for item in items]
    said = describe(f"{name}@test", n=None, seed=0)
    assert "rows with the fields of items.jsonl (test, 20 rows)\nitems: 20" in said
    with pytest.raises(UsageError, match=r"holds items \(items.jsonl\), single images; pairs are needed"):
        load_pairs(f"{name}@test")


def test_pairs_of_json_lines_name_pictures_of_the_folder(tmp_path):
    for number in (1, 2):
        (tmp_path / "d").mkdir(exist_ok=True)
        picture(number).save(tmp_path / "d" / f"{number}.png")
    row = ASK | {
        "image": "1.png",
        "counterfactual_image": "2.png",
        "counterfactual_answer": "blue",
        "object": [0, 0, 9, 9],
    }
    write_lines(tmp_path / "d" / "test.jsonl", [row, row | {"counterfactual_image": "1.png"}])
    name = f"hf:{tmp_path / 'd'}"
    # `datasets` would take a folder with pictures for one of classes.
    (tmp_path / "d" / "README.md").write_text("---\nconfigs:\n- config_name: mine\n  data_files: test.jsonl\n---\n")
    pairs = load_pairs(f"{name}:mine")
    assert len(pairs) == 1 and tuple(map(shown, pairs[0].pictures)) == (1, 2)
    assert "same pixels" in pairs.refused[0].reason and pairs.name == f"{name}:mine"
    assert pair_fields(pairs.name)["1"]["object"] == [0, 0, 9, 9]
    assert "pairs: 1" in describe(f"{name}:mine", n=None, seed=0)


def test_a_format_is_known_by_its_columns(tmp_path, monkeypatch):
    """As from its own parquet; pictures stay in the data set, and an empty cell is none."""
    pictures = {f"image_{at}": IMAGE for at in range(1, 8)}
    rows = [
        {"question": f"<image {at}>?", "options": "['a', 'b']", "answer": "B", "image_1": held(1), "image_2": held(2)}
        | {f"image_{empty}": None for empty in range(3, 8)}
        for at in (1, 2, 3)
    ]  # fmt: skip
    texts = {"question": TEXT, "options": TEXT, "answer": TEXT}
    name = made(tmp_path / "d", texts | pictures, validation=rows)
    opened = counted(monkeypatch)
    items = load_items(name)
    assert len(opened) == 2 and [shown(item.image) for item in items] == [1, 2] and items.answer == ["b", "b"]
    assert "it has no image_3" in items.refused[0].reason and isinstance(items[0].image, Held)
    write_parquet(tmp_path / "e" / "validation.parquet", rows)
    assert load_items(f"mmmu:{tmp_path / 'e'}").digest == items.digest
    assert "format mmmu (validation, 3 rows)" in describe(name, n=None, seed=0)


def test_a_split_that_is_missing_and_columns_that_fit_nothing_are_one_line(tmp_path, capsys):
    rows = [{"picture": held(1), "asked": "q"}]
    name = made(tmp_path / "d", {"picture": IMAGE, "asked": TEXT}, train=rows, test=rows)
    with pytest.raises(UsageError, match=f"{name}' has the splits train, test; name one, as in {name}@test"):
        load_items(name)
    with pytest.raises(UsageError, match=f"data set '{name}@dev' has no split 'dev'; it has train, test"):
        load_pairs(f"{name}@dev")
    for data, said in ((f"{name}@test", "has the columns picture, asked; pairs need image, counterfactual_image, "
                        "question, answer, counterfactual_answer; items need image, question, answer, and formats"),
                       (f"hf:{tmp_path / 'nowhere'}", "cannot be loaded")):  # fmt: skip
        capsys.readouterr()
        assert command(layer_swap, "--describe", "--data", data) == 2
        error = capsys.readouterr().err
        assert said in error.splitlines()[-1], error


def test_pictures_with_a_class_are_what_classify_reads(tmp_path):
    features = {"image": IMAGE, "label": datasets.ClassLabel(names=["cat", "dog"])}
    rows = [{"image": held(at), "label": at % 2} for at in range(12)]
    parts = {"train": rows[:6], "validation": rows[6:8], "test": rows[8:]}
    name = made(tmp_path / "d", features, **parts)
    assert len(load_classes(name).test) == 4
    assert "images with a class\nclasses: 2\nimages: train 6, validation 2, test 4" in describe(name, n=None, seed=0)
    with pytest.raises(UsageError, match="the columns image, label .images with a class, which classify reads.; pairs"):
        load_items(f"{name}@test")


def test_without_datasets_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    for load in (load_items, load_pairs, load_classes):
        with pytest.raises(UsageError, match=r"data 'hf:a/b' needs datasets, .*: pip install \"vlm_mech\[data\]\""):
            load("hf:a/b")


def test_without_pycocotools_one_line_says_what_to_install(tmp_path, monkeypatch):
    """Files of PACO are read all the same; nothing half written is left."""
    export("paco", tmp_path / "made", n=2)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UsageError, match=r"masks of COCO need pycocotools, .*: pip install \"vlm_mech\[data\]\""):
        export("paco", tmp_path / "none", n=2)
    assert not (tmp_path / "none").exists()
    assert len(load_items(f"paco:{tmp_path / 'made'}")) > 2
    mask = next(iter(pair_fields(f"paco:{tmp_path / 'made'}").values()))["part_mask"]
    with pytest.raises(UsageError, match="masks of COCO need pycocotools"):
        pixels_of(mask, tmp_path)


def test_the_hub_is_not_imported_before_it_is_asked():
    code = "import sys, vlm_mech.data.description\nassert not {'datasets', 'pycocotools'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_pictures_alone_are_one_line(tmp_path):
    name = made(tmp_path / "d", {"image": IMAGE}, train=[{"image": held(1)}])
    with pytest.raises(UsageError, match="has the columns image; pairs need"):
        load_items(name)
