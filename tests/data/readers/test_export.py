"""Every format end to end: generated scenes written in its layout are read as the same pictures, and run."""

import dataclasses
import json

import pandas as pd
import pytest

from experiments import layer_swap
from tests.helpers import as_folder, command, some_long
from vlm_mech.data.counterfactual_scenes import sample_pairs
from vlm_mech.data.examples import as_pairs
from vlm_mech.data.export.__main__ import WRITERS, export, main
from vlm_mech.data.export.items import asked
from vlm_mech.data.export.pairs import STATEMENTS, WHATSUP
from vlm_mech.data.export.parts import part_scenes
from vlm_mech.data.export.writing import related
from vlm_mech.data.fitting import fitting
from vlm_mech.data.items import load_items
from vlm_mech.data.pairs import load_pairs
from vlm_mech.data.readers.registry import formats
from vlm_mech.data.render import render
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image
from vlm_mech.methods.knockout.data import scan_of
from vlm_mech.methods.knockout.study import knock_out
from vlm_mech.models.vlm import VLM
from vlm_mech.results.result import Result

N, SEED = 8, 3


@pytest.fixture(scope="module")
def organism():
    return VLM.load("organism")


PAIRS = [each.name for each in formats() if each.holds == "pairs" and each.known_by_files]
ITEMS = [each.name for each in formats() if each.holds == "items"]
OTHERS = [each.name for each in formats() if each.holds in ("text", "classes")]


def of_pairs(name, n=N):
    """Each pair of a set as its two scenes with their answers."""
    for pair in sample_pairs(name, n, seed=SEED, split="test"):
        yield (pair.scene, pair.question.answer), (pair.counterfactual, pair.counterfactual_answer)


def of_sets():
    """What'sUp: of each group the two pairs of opposite relations."""
    sides = {"left_of": "left", "right_of": "right", "in-front_of": "in front of"}
    for relations in (WHATSUP["controlled_clevr"], WHATSUP["controlled_images"]):
        for scenes in related(relations, 2, seed=SEED):
            for two in (("left_of", "right_of"), ("on", "under"), ("in-front_of", "behind")):
                if set(two) <= set(scenes):
                    yield tuple((scenes[each], sides.get(each, each)) for each in two)


def of_statements():
    for at, (name, _) in enumerate(STATEMENTS.values()):
        yield from of_pairs(name, (N - at + 2) // 3)


def scenes_of(name):
    """The pairs that a format is written from: two scenes with their answers."""
    if name == "whatsup":
        return list(of_sets())
    if name == "mmvp-vlm":
        return list(of_statements())
    return list(
        of_pairs({"mmvp": "colour", "visual-counterfact": "colour-conflict", "hallusionbench": "presence"}[name])
    )


def item_scenes(name):
    """The items that a format is written from: their scenes with the answer."""
    if name in ("coco-spatial", "gqa-spatial"):
        one = [((scene,), question.answer) for scene, question in asked("half", ("single",), 4, SEED)]
        named = (("right_of", "left_of")[number % 2] for number in range(4))
        groups = related(("left_of", "right_of"), 4, seed=SEED)
        two = ((scenes, each) for scenes, each in zip(groups, named, strict=True))
        return [*one, *(((scenes[each],), each.removesuffix("_of")) for scenes, each in two)]
    if name == "mmmu":
        return [((one[0], other[0]), {one[1], other[1]}) for one, other in of_pairs("colour")]
    if name == "vlmbias":
        return [((other[0],), other[1]) for _, other in of_pairs("colour-conflict")]
    if name == "hrbench":
        return [((scene,), q.answer) for scene, q in asked("colour", ("few",), N // 4, SEED) for _ in range(4)]
    if name in ("paco", "pascal-part"):
        return [((scene,), part) for scene, _, _, parts in part_scenes(N, SEED) for part in parts]
    kind, family = {"pope": ("presence", "few"), "vstar": ("colour", "few"), "imagewikiqa": ("two-hop", "beetle")}[name]
    return [((scene,), question.answer) for scene, question in asked(kind, (family,), N, SEED)]


def pixels(images):
    return [load_image(each).tobytes() for each in images]


def test_every_format_is_written():
    assert sorted(WRITERS) == sorted(PAIRS + ITEMS + OTHERS) and PAIRS and ITEMS and OTHERS


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_the_same_scenes_pixel_for_pixel(name, tmp_path):
    export(name, tmp_path / "made", n=N, seed=SEED)
    pairs = load_pairs(f"{name}:{tmp_path / 'made'}")
    expected = scenes_of(name)
    assert len(pairs) == len(expected) == N and pairs.refused == ()
    shown = {tuple(pixels(pair.pictures)): (pair.answer, pair.counterfactual_answer) for pair in pairs}
    for two in expected:
        answers = shown[tuple(render(scene).tobytes() for scene, _ in two)]
        assert all(right in said.split() or right == said for said, (_, right) in zip(answers, two, strict=True))
    assert load_pairs(tmp_path / "made").digest == pairs.digest, "known by its files"


@pytest.mark.parametrize("name", ITEMS)
def test_items_are_the_same_scenes_pixel_for_pixel(name, tmp_path):
    export(name, tmp_path / "made", n=N, seed=SEED)
    items = load_items(f"{name}:{tmp_path / 'made'}")
    expected = item_scenes(name)
    assert len(items) == len(expected) >= N and items.refused == ()
    for item, (scenes, answer) in zip(items, expected, strict=True):
        assert pixels(item.images) == [render(scene).tobytes() for scene in scenes]
        assert item.answer in answer if isinstance(answer, set) else item.answer == answer
    assert load_items(tmp_path / "made").digest == items.digest


@pytest.mark.parametrize("name", some_long(ITEMS, ITEMS[::3]))
def test_items_give_the_numbers_of_the_same_scenes(name, organism, tmp_path):
    """To the bit, in a knockout of all layers."""
    export(name, tmp_path / "made", n=N, seed=SEED)
    # Rows in the middle: of both kinds where a format has two.
    read = load_items(f"{name}:{tmp_path / 'made'}")[2:6]
    drawn = [tuple(render(scene) for scene in scenes) for scenes, _ in item_scenes(name)][2:6]
    direct = [dataclasses.replace(item, image=images) for item, images in zip(read, drawn, strict=True)]
    tables = []
    for items in (read, dataclasses.replace(read, items=tuple(direct))):
        pairs = fitting(organism, as_pairs(items), variants="as-written", whole=True, alone=True)
        scan = scan_of(organism, pairs, {}, ("last<-image",), layers="all", heads=False, during="prompt")
        tables.append(knock_out(organism, pairs, scan, only_correct=False, measure="logprob_diff")[0])
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert tables[0]["prob"].notna().any()


def swapped(data, out, *more):
    """The table of a layer swap on the embedded model."""
    given = ("--data", data, "--all", "--spans", "image", "--direction", "noising", "--variants", "as-written")
    assert command(layer_swap, *given, "--out", out, *more) == 0
    return Result.load(out).table


def test_whatsup_gives_the_numbers_of_the_same_pairs_as_lines(tmp_path):
    """To the bit. `under` is no word of the embedded model: its pairs are counted out."""
    export("whatsup", tmp_path / "made", n=N, seed=SEED)
    data = f"whatsup:{tmp_path / 'made'}"
    found = swapped(data, tmp_path / "one")
    pairs = load_pairs(data)
    lines = as_folder(tmp_path / "lines", pairs, more=[{"group": pair.group} for pair in pairs])
    assert found.equals(swapped(lines, tmp_path / "other"))
    assert found["example"].nunique() == 6
    refused = json.loads((tmp_path / "one" / "provenance.json").read_text())["refused"]
    assert len(refused) == 2 and all("'under' is not in the model's vocabulary" in each["reason"] for each in refused)


def test_mmvp_gives_the_numbers_of_the_generated_scenes(tmp_path):
    export("mmvp", tmp_path / "made", n=4, seed=SEED)
    found = swapped(f"mmvp:{tmp_path / 'made'}", tmp_path / "one")
    scenes = swapped("scenes/colour", tmp_path / "other", "--n", "4", "--seed", SEED)
    names = ["example", "group"]
    assert found.drop(columns=names).equals(scenes.drop(columns=names)) and len(found) > 20


def test_a_run_that_is_resumed_knows_its_pictures(tmp_path, capsys):
    export("mmvp", tmp_path / "made", n=2)
    data = f"mmvp:{tmp_path / 'made'}"
    swapped(data, tmp_path / "out")
    (tmp_path / "made" / "MMVP Images" / "1.jpg").write_bytes(
        (tmp_path / "made" / "MMVP Images" / "3.jpg").read_bytes()
    )
    given = ("--data", data, "--all", "--spans", "image", "--direction", "noising", "--variants", "as-written")
    assert command(layer_swap, *given, "--out", tmp_path / "out", "--resume") == 2
    assert "data" in capsys.readouterr().err


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(UsageError, match="`export whatsup` writes the files that whatsup-four: reads"):
        export("whatsup-four", tmp_path / "other")
    with pytest.raises(UsageError, match="format 'mvp' is not known; use one of whatsup, mmvp"):
        export("mvp", tmp_path / "made")
    with pytest.raises(UsageError, match="n is 0; at least one example is needed"):
        export("mmvp", tmp_path / "made", n=0)
    with pytest.raises(UsageError, match="500 groups were requested; there are 240"):
        export("whatsup", tmp_path / "made", n=2_000)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is there already and not empty; name a new folder"):
        export("mmvp", tmp_path)
    monkeypatch.setattr("sys.argv", ["export", "mvp", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert error.startswith("error: format 'mvp'") and error.count("\n") == 1
