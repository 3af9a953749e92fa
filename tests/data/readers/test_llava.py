"""Training text: read in turn whatever its size, counted by hand, and refused where pairs or items are wanted."""

import json
import re
import tracemalloc

import pytest

from experiments import layer_swap
from tests.data.readers.made import save, write_json, write_lines
from tests.helpers import command
from vlm_mech.data.export.__main__ import export
from vlm_mech.data.items import load_items
from vlm_mech.data.pairs import load_pairs
from vlm_mech.data.readers.format import ReaderOptions
from vlm_mech.data.readers.llava import FORMAT, Entry
from vlm_mech.data.readers.registry import find_source
from vlm_mech.data.readers.streamed import values
from vlm_mech.data.training_text import describe_text, entries
from vlm_mech.data.user_files import Refused
from vlm_mech.errors import UsageError


def turns(*texts):
    return [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]


ENTRIES = [
    {"id": "a", "image": "coco/1.jpg", "conversations": turns("<image>\nWhere is it?", "It is On the  Left.")},
    {"id": "b", "conversations": turns("Which hand is to the left?", "None.", "Sure?", "Yes.")},
    {
        "id": "c",
        "image": "2.jpg",
        "conversations": turns("Is it to the right?\n<image>", "Yes, far upon the leftover."),
    },
    {"image": "3.jpg", "conversations": turns("What?", "A cup at the right.")},
    {"id": "e", "image": "2.jpg", "conversations": []},
    {"id": "f", "image": ["1.jpg", "2.jpg"], "conversations": turns("What?", "Cups.")},
    {"id": "g", "conversations": [{"from": "gpt"}]},
    "h",
]


@pytest.fixture
def made(tmp_path):
    write_json(tmp_path / "llava.json", ENTRIES)
    save(tmp_path / "images" / "coco" / "1.jpg", 1)
    save(tmp_path / "images" / "2.jpg", 2)
    return tmp_path


def test_entries_have_their_turns_and_pictures(made):
    read = list(entries(f"llava:{made}"))
    kept = [each for each in read if isinstance(each, Entry)]
    assert [each.id for each in kept] == ["a", "b", "c", "llava.json row 4"]
    assert kept[0].turns == (("human", "Where is it?"), ("gpt", "It is On the Left."))
    assert kept[0].image == made / "images" / "coco" / "1.jpg" and kept[1].image is None
    assert kept[1].answers == ("None.", "Yes.") and kept[2].turns[0] == ("human", "Is it to the right?")
    # "to the right" is none of the five phrases of the paper, and "upon the leftover" holds none of them.
    assert [each.names_a_side for each in kept] == [True, True, False, True]
    refused = [each for each in read if isinstance(each, Refused)]
    assert [each.id for each in refused] == [f"llava.json row {number}" for number in (5, 6, 7, 8)]
    for each, said in zip(
        refused, ("conversations is []", "image is ['1.jpg'", "conversations is [{", "a str"), strict=True
    ):
        assert said in each.reason
    source = find_source(made / "llava.json", others=True)
    assert source is not None and source.format is FORMAT
    assert [row.fields["turns"][0][0] for row in source.rows(ReaderOptions()).rows] == ["human"] * 4


def test_what_it_holds_is_counted(made, capsys):
    expected = [
        "entries of training text: 4",
        "with an image: 3, without: 1; images that are not there: 1",
        "turns: 10 (human 5, gpt 5)",
        "turns in an entry: 2 3, 4 1",
        "about left and right (--sides): 3, 2 of them with an image",
        "cannot be used: 4",
    ]
    assert describe_text(f"llava:{made}")[: len(expected)] == expected
    assert command(layer_swap, "--describe", "--data", f"llava:{made}", "--n", "4") == 0
    said = capsys.readouterr().out
    assert "format llava (llava.json)\nentries of training text: 4\n" in said and "asked for" not in said
    assert command(layer_swap, "--describe", "--data", f"llava:{made}", "--n", "9") == 0
    assert "\nnote: requested 9, the source holds 8, 4 of which can be used\n" in capsys.readouterr().out
    rows = [entry for entry in ENTRIES if not isinstance(entry, str)]
    lines = write_lines(made / "lines" / "llava.jsonl", rows)
    with lines.open("a") as file:
        file.write("no JSON\n")
    assert describe_text(f"llava:{lines}")[0] == expected[0]
    assert "  llava.jsonl row 8: it is not JSON" in "\n".join(describe_text(lines))


def test_what_wants_pairs_or_items_says_so_in_one_line(made, tmp_path, capsys):
    for load in (load_pairs, load_items):
        with pytest.raises(UsageError, match=r"holds training text \(llava\), neither pairs nor items; contrastive"):
            load(made)
    assert command(layer_swap, "--data", f"llava:{made}", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    save(tmp_path / "items" / "1.png", 1)
    asked = {"image": "1.png", "text": "q", "label": "yes", "question_id": 1}
    write_lines(tmp_path / "items" / "coco_pope_random.json", [asked])
    with pytest.raises(UsageError, match=r"is not training text, as in llava:FILE; it holds items \(pope\)"):
        entries(tmp_path / "items")


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
def test_a_list_is_read_in_pieces_of_any_size(tmp_path, piece):
    wanted = [*ENTRIES, {"ü": "“]}, {”"}, 12, [1, [2]], "é, ]", True, None, -1.5e3]
    for indent in (None, 2):
        path = tmp_path / "list.json"
        path.write_text(json.dumps(wanted, ensure_ascii=False, indent=indent) + " \n", encoding="utf-8")
        read = list(values(path, piece=piece))
        assert [value for _, value in read] == wanted
        assert read[8][0] == "list.json row 9"
    for text in ("[]", " [ ] ", "\ufeff[ ]"):
        path.write_text(text)
        assert list(values(path, piece=piece)) == []


def test_text_that_a_mark_says_to_be_utf_16_is_training_text_too(made, tmp_path):
    (tmp_path / "wide").mkdir()
    for text in (json.dumps(ENTRIES), "\n".join(map(json.dumps, ENTRIES))):
        (tmp_path / "wide" / "llava.json").write_text(text, encoding="utf-16")
        assert [value for _, value in values(tmp_path / "wide" / "llava.json")] == ENTRIES
        assert describe_text(tmp_path / "wide")[0] == "entries of training text: 4"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"a": 1}, {"a": 2', "cannot be read: it is not JSON at row 2"),
        ('[{"a": 1}', "it ends after row 1; a comma or a ] is needed"),
        ('[{"a": 1} {"a": 2}]', "'{' follows row 1"),
        ("[1,]", "cannot be read: it is not JSON at row 2"),
        ("[1] 2", "'2' follows the end of its list"),
        ('["\xff"]', "it is not UTF-8 (byte 0xff)"),
    ],
)
def test_a_broken_list_is_told_with_its_place(tmp_path, text, said):
    path = tmp_path / "list.json"
    path.write_bytes(text.encode("latin-1"))
    for piece in (3, 1 << 20):
        with pytest.raises(UsageError, match=re.escape(said)):
            list(values(path, piece=piece))


def test_memory_stays_flat(tmp_path):
    """Two megabytes of text, of which a piece is in memory."""
    path = tmp_path / "llava.json"
    path.write_text(f"[{', '.join([json.dumps({'conversations': turns('what?', 'a' * 4_000)})] * 500)}]")
    assert path.stat().st_size > 2e6
    tracemalloc.start()
    assert sum(len(value["conversations"]) == 2 for _, value in values(path, piece=1 << 14)) == 500
    assert tracemalloc.get_traced_memory()[1] < 4e5
    tracemalloc.stop()


def test_generated_scenes_are_training_text(tmp_path):
    export("llava", tmp_path / "made", n=12)
    assert describe_text(tmp_path / "made")[:-1] == [
        "entries of training text: 12",
        "with an image: 10, without: 2; images that are not there: 0",
        "turns: 44 (human 22, gpt 22)",
        "turns in an entry: 2 2, 4 10",
        "about left and right (--sides): 8, 8 of them with an image",
    ]
