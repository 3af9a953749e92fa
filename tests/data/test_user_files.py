"""Files of the user's own: how lines end, marks at their beginning, rows that are none, and what n rows are drawn."""

import base64
import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from experiments import layer_swap
from tests.helpers import command
from tests.zoo.tiny import picture
from vlm_mech.data.examples import load_examples
from vlm_mech.data.items import Items, load_items
from vlm_mech.data.pairs import Refused, load_pairs
from vlm_mech.data.user_files import read_cells
from vlm_mech.errors import UsageError, shortened
from vlm_mech.runs.provenance import left_out

QUESTION = "what colour is\u2028the\u0085circle?"
BOM = b"\xef\xbb\xbf"


def encoded(number):
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def row(number, **changed):
    """A line with its pictures in base64."""
    made = {"image": encoded(number), "counterfactual_image": encoded(number + 100), "question": "what is it?"}
    return made | {"answer": "red", "counterfactual_answer": "blue"} | changed


def write(path, *rows, before=b"", end="\n"):
    lines = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in rows]
    path.write_bytes(before + "".join(line + end for line in lines).encode())
    return path


def test_a_line_without_an_id_may_have_the_number_that_another_is_called_by(tmp_path):
    write(tmp_path / "pairs.jsonl", row(0, id=2), row(1), row(2))
    assert [pair.id for pair in load_pairs(tmp_path)] == ["2", "line 2", "3"]


def test_lines_end_at_a_line_feed_alone(tmp_path):
    """U+2028 and U+0085 may stand inside a JSON text; str.splitlines would cut it there."""
    for end in ("\n", "\r\n"):
        write(tmp_path / "pairs.jsonl", row(1, question=QUESTION), row(2), end=end)
        pairs = load_pairs(tmp_path)
        assert [pair.question for pair in pairs] == [QUESTION, "what is it?"] and pairs.refused == ()


def test_a_byte_order_mark_hides_nothing(tmp_path):
    write(tmp_path / "pairs.jsonl", row(1), row(2), before=BOM)
    assert [pair.id for pair in load_pairs(tmp_path)] == ["1", "2"]
    (tmp_path / "names.csv").write_bytes(BOM + b"n01,crane\r\n\r\nn02,wren\r\n")
    assert read_cells(tmp_path / "names.csv", "names") == {1: ["n01", "crane"], 3: ["n02", "wren"]}
    (tmp_path / "names.csv").write_bytes(b"n01,gr\xfcn\n")
    with pytest.raises(UsageError, match="names '.*names.csv' cannot be read: .*utf-8"):
        read_cells(tmp_path / "names.csv", "names")


def test_pictures_in_base64_are_pictures(tmp_path):
    write(tmp_path / "pairs.jsonl", row(1), row(2, image=f"data:image/png;base64,{encoded(2)}"))
    pairs = load_pairs(tmp_path)
    assert [pair.image.tobytes() for pair in pairs] == [picture(1).tobytes(), picture(2).tobytes()]
    assert pairs[0].counterfactual_image.tobytes() == picture(101).tobytes()


def test_a_row_without_an_id_has_the_number_of_its_line(tmp_path):
    write(tmp_path / "pairs.jsonl", row(1, id=None), "", row(2, id=7), row(3, id="c"), row(4, id=[1]), row(5, id=" "))
    pairs = load_pairs(tmp_path)
    assert [pair.id for pair in pairs] == ["1", "7", "c"]
    assert [each.reason for each in pairs.refused] == [
        "line 5 has the id [1]; a text or a number is needed", "line 6 has the id ' '; a text or a number is needed",
    ]  # fmt: skip


@pytest.mark.usefixtures("untyped")
def test_a_bad_row_is_named_in_short_and_the_rest_goes_on(tmp_path):
    noise = base64.b64encode(bytes(range(256)) * 68).decode()[:23_247]
    bad = [noise, "[1]", row(3, image=noise), row(4, answer=noise, counterfactual_answer=noise), row(5, answer=[noise])]
    bad += [row(6, id="x" * 900, question=" "), row(7, conflict=noise)]
    write(tmp_path / "pairs.jsonl", *bad, row(8))
    with (tmp_path / "pairs.jsonl").open("ab") as lines:
        lines.write(b'{"question": "gr\xfcn"}\n')
    pairs = load_pairs(tmp_path)
    assert [pair.id for pair in pairs] == ["8"] and len(pairs.refused) == len(bad) + 1
    assert all(len(f"{each.id}: {each.reason}") <= 200 for each in pairs.refused)
    told = [each.reason for each in pairs.refused]
    expected = (
        "line 1 is not JSON",
        "line 2 is a list",
        "does not exist",
        "they must differ",
        "answer is",
        "question is",
    )
    for reason, said in zip(told, (*expected, "conflict is", "line 9 is not UTF-8"), strict=True):
        assert said in reason
    said = left_out({"refused": [vars(each) for each in pairs.refused]})[0]
    assert said.startswith("8 examples could not be used: line 1 is not JSON") and len(said) < 3 * 200 + 100
    assert load_pairs(tmp_path, n=1).refused, "lines that hold no object are told however few are drawn"


def test_a_folder_without_a_usable_row_is_one_line(tmp_path, capsys):
    write(tmp_path / "pairs.jsonl", row(1, image="A" * 20_000))
    assert command(layer_swap, "--data", tmp_path, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "holds no usable pair; the first (1) was refused because image '" in error and "AAA' does not exist" in error
    assert len(error) < 400 and error.count("\n") == 1


def test_a_text_is_shortened_in_its_middle():
    assert shortened("a b") == "a b" and shortened("a\n b") == "a b"
    found = shortened("a" * 500 + "b" * 500)
    assert len(found) == 200 and found.startswith("aaa") and found.endswith("bbb") and "1000 characters" in found
    refused = Refused("i" * 500, "r" * 500)
    assert len(refused.id) + len(refused.reason) == 198


# Which rows are drawn


def test_n_rows_are_drawn_with_the_seed_and_keep_their_order(tmp_path):
    """The first n of a benchmark that is sorted by topic would be one topic."""
    rows = [row(number, id=f"{'ab'[number >= 10]}{number:02d}") for number in range(20)]
    write(tmp_path / "pairs.jsonl", *rows)
    found = [load_pairs(tmp_path, n=8, seed=seed) for seed in range(4)]
    ids = [[pair.id for pair in pairs] for pairs in found]
    assert all(len(each) == 8 and each == sorted(each) and {name[0] for name in each} == {"a", "b"} for each in ids)
    assert len({tuple(each) for each in ids}) == 4
    assert ids[1] == [pair.id for pair in load_pairs(tmp_path, n=8, seed=1)]
    assert found[1].described == {
        "name": str(tmp_path), "n": 8, "hash": found[1].digest, "drawn": "8 of 20 rows, drawn with seed 1",
    }  # fmt: skip
    whole = load_pairs(tmp_path)
    assert [pair.id for pair in whole] == [each["id"] for each in rows] and "drawn" not in whole.described
    assert load_pairs(tmp_path, n=20, seed=3).described == whole.described


def test_another_row_is_drawn_for_one_that_cannot_be_used(tmp_path):
    rows = [row(number, **({"image": "none.png"} if number % 2 else {})) for number in range(12)]
    write(tmp_path / "pairs.jsonl", *rows)
    pairs = load_pairs(tmp_path, n=5, seed=0)
    assert len(pairs) == 5 and 0 < len(pairs.refused) <= 6
    assert [int(each.id) for each in pairs.refused] == sorted(int(each.id) for each in pairs.refused)
    assert len(load_pairs(tmp_path, n=12)) == 6


def test_a_stream_may_fill_one_array_for_every_row():
    buffer = np.zeros((8, 8, 3), np.uint8)

    def frames():
        for number in range(4):
            buffer[:] = 10 * number
            yield {"images": [buffer], "question": f"q{number}", "answer": "a"}

    found = Items.from_rows(frames())
    assert [int(np.asarray(item.image).max()) for item in found] == [0, 10, 20, 30]


def test_a_transform_of_a_data_set_is_given_pictures():
    datasets = pytest.importorskip("datasets")
    rows = [{"image": Image.new("RGB", (4, 4), (number, 0, 0)), "question": "q", "answer": "a"} for number in range(3)]
    source = datasets.Dataset.from_list(rows)

    def brighter(batch):
        return dict(batch, image=[image.point(lambda value: value + 100) for image in batch["image"]])

    found = Items.from_rows(source.with_transform(brighter))
    assert [np.asarray(item.image)[0, 0, 0] for item in found] == [100, 101, 102]


@pytest.mark.parametrize(
    "given", [None, [[1]], io.BytesIO(b"x"), torch.zeros(4, 4, 3), pd.Series([1])], ids=lambda each: type(each).__name__
)
def test_what_is_no_picture_is_counted_out_in_one_line(given):
    rows = [{"image": each, "question": "q", "answer": "a"} for each in (Image.new("RGB", (4, 4)), given)]
    found = Items.from_rows(rows)
    assert len(found) == 1 and "an image is needed" in found.refused[0].reason


def test_rows_in_memory_that_hold_no_pair_are_one_line(untyped):
    for given, said in (
        (None, "takes rows, not a NoneType"),
        ([{"image": 1}], "the first was refused because row 1: image is 1; an image is needed"),
        (pd.DataFrame({"a": [1]}), "row 1: image is missing; an image is needed"),
    ):
        with pytest.raises(UsageError, match=said):
            load_pairs(given)


@pytest.mark.parametrize("load", [load_items, load_examples])
@pytest.mark.parametrize("given", [None, [{"image": 1}], pd.DataFrame({"a": [1]})], ids=["none", "rows", "frame"])
def test_what_names_no_data_is_one_line(untyped, load, given):
    with pytest.raises(UsageError, match="data are named by a text or a path, and a .* was given; Pairs.from_rows and"):
        load(given)
