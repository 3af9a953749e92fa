"""PACO and Pascal-Part: parts with their masks, to the pixel; through crops, tiles and merges; and a run on them."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import compensation as experiment
from tests.data.readers.made import save, write_json, write_lines
from tests.helpers import command
from tests.zoo import ZOO
from tests.zoo.tiny import picture
from vlm_mech.data.counterfactual_scenes import sample_pairs
from vlm_mech.data.export.__main__ import export
from vlm_mech.data.items import load_items
from vlm_mech.data.masks import pixels_of
from vlm_mech.data.pairs import load_pairs
from vlm_mech.data.readers.format import ReaderOptions
from vlm_mech.data.readers.pascal_part import part_word
from vlm_mech.data.readers.registry import find_source
from vlm_mech.data.readers.stored_masks import CocoMask
from vlm_mech.data.sources import find_data
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.wording import BARE
from vlm_mech.methods.compensation.data import about_one_picture, load_examples, places_of, shown_parts
from vlm_mech.methods.lens.identifiability import patches_of_mask
from vlm_mech.models.vlm import VLM
from vlm_mech.results.result import Result

FORMATS = ("paco", "pascal-part")


def boxed(left, top, right, bottom):
    """A polygon of COCO around these pixels, right and bottom exclusive."""
    return [left, top, right, top, right, bottom, left, bottom]


def annotation(number, category, of, segmentation, image=1):
    told = {"id": number, "category_id": category, "image_id": image, "obj_ann_id": of, "segmentation": segmentation}
    return told | {"bbox": [], "area": 0}


KINDS = ["cat_(animal)", "dog", "cat_(animal):star", "cat_(animal):circle", "dog:star", "dog:square_part", "dog:circle"]
PARTS = [
    annotation(1, 1, 1, [boxed(0, 0, 20, 10)]), annotation(2, 3, 1, [boxed(2, 2, 6, 6), boxed(10, 2, 12, 4)]),
    annotation(3, 3, 1, [boxed(0, 0, 3, 3)]), annotation(4, 2, 4, [boxed(0, 0, 30, 30)]),
    annotation(5, 6, 4, {"size": [56, 56], "counts": [2, 3, 56 * 56 - 5]}), annotation(6, 5, 4, [boxed(0, 0, 5, 5)]),
    annotation(8, 4, 1, [boxed(9, 9, 15, 15)]),
]  # fmt: skip
"""A cat whose star is in two annotations, of three boxes, and a dog."""


def paco(folder, annotations=PARTS, size=(56, 56), name="paco_lvis_v1_val.json"):
    save(folder / "val2017" / "1.jpg", 1)
    picture(1, *size).save(folder / "val2017" / "1.jpg", "PNG")
    images = [{"id": 1, "file_name": "1.jpg", "width": size[0], "height": size[1]}]
    categories = [{"id": at, "name": name} for at, name in enumerate(KINDS, 1)]
    write_json(folder / name, {"images": images, "annotations": annotations, "categories": categories})
    return folder


def rows_of(data):
    found = find_source(data)
    assert found is not None
    return found.root, found.rows(ReaderOptions())


def test_parts_are_items_and_their_masks_are_counted_by_hand(tmp_path):
    root, rows = rows_of(paco(tmp_path))
    fields = {row.id: row.fields for row in rows.rows}
    assert list(fields) == ["1/star", "1/circle", "4/square part", "4/star"] and not rows.refused
    star = pixels_of(fields["1/star"]["part_mask"], root)
    expected = np.zeros((56, 56), dtype=bool)
    expected[2:6, 2:6] = expected[2:4, 10:12] = expected[:3, :3] = True
    assert star.shape == (56, 56) and (star == expected).all() and star.sum() == 16 + 4 + 9 - 1
    run = pixels_of(fields["4/square part"]["part_mask"], root)
    assert run.sum() == 3 and run[2:5, 0].all(), "run lengths go down the columns"
    assert pixels_of(fields["4/star"]["object_mask"], root).sum() == 900
    items = load_items(f"paco:{tmp_path}")
    assert {item.category for item in items} == {"cat", "dog"} and items.answer[2] == "square part"
    # Both show all parts of their kinds, so that the other option is one that no other of the kind has.
    assert [set(item.options) - {item.answer} for item in items] == [{"square part"}] * 2 + [{"circle"}] * 2
    assert items[0].question.startswith("Which part of the cat is in the picture, the ")
    paco(tmp_path, [*PARTS, annotation(9, 1, 9, [boxed(0, 0, 9, 9)]), annotation(10, 3, 9, [boxed(0, 0, 3, 3)])])
    assert set(load_items(tmp_path).items[-1].options) == {"star", "circle"}, "which the other cat shows"


def test_a_dog_with_all_parts_there_are_has_nothing_to_be_told_from(tmp_path):
    items = load_items(paco(tmp_path, [each for each in PARTS if each["id"] != 8]))
    assert [set(item.options) for item in items] == [{"star", "square part"}]
    assert [each.id for each in items.refused] == ["4/square part", "4/star"]
    assert "there is no part that it does not show" in items.refused[0].reason


def test_what_is_no_part_is_counted_and_what_is_no_coco_is_one_line(tmp_path):
    bad = [
        annotation(20, 3, 99, [boxed(0, 0, 5, 5)]), annotation(21, 77, 1, []), annotation(22, 1, 22, [], image=5),
        annotation(23, 3, 22, [boxed(0, 0, 5, 5)], image=5), annotation(24, 1, 24, [boxed(0, 0, 5, 5)]),
        annotation(25, 3, 24, None),
    ]  # fmt: skip
    items = load_items(paco(tmp_path, [*PARTS, *bad]))
    told = {each.id: each.reason for each in items.refused}
    assert "its object, annotation 99, is missing" in told["20"] and "its category 77 has no name" in told["21"]
    assert "its image 5 is missing" in told["22/star"] and "has no segmentation" in told["24/star"]
    assert len(items) == 4
    bare = {"images": [{}], "annotations": [], "categories": []}
    told = ("lists images, annotations, categories are needed", "lists images", "number 0 of images has no id")
    for wrong, said in zip(([], {"images": []}, bare), told, strict=True):
        write_json(tmp_path / "paco_lvis_v1_val.json", wrong)
        with pytest.raises(UsageError, match=said):
            load_items(f"paco:{tmp_path}")
    paco(tmp_path, [*PARTS, PARTS[0]])
    with pytest.raises(UsageError, match="the id 1 occurs twice in annotations"):
        load_items(tmp_path)
    packed, small = {"size": [56, 56], "counts": 7}, {"size": [9, 9], "counts": [81]}
    for segmentation, said in (([[1]], "cannot"), (packed, "cannot"), (small, "has 9 x 9 pixels, the image 56 x 56")):
        with pytest.raises(UsageError, match=f"x.json annotation 1: its segmentation {said}"):
            pixels_of(CocoMask((segmentation,), 56, 56, "x.json annotation 1"), tmp_path)


def test_another_coco_file_is_no_paco_and_one_of_ours_is(tmp_path):
    paco(tmp_path, name="mine.json")
    assert len(load_items(tmp_path)) == 4, "its first annotation says of which object it is a part"
    plain = [{key: value for key, value in each.items() if key != "obj_ann_id"} for each in PARTS]
    paco(tmp_path, plain, name="mine.json")
    with pytest.raises(
        UsageError, match="holds no file of the format paco: mine.json has these columns with other values"
    ):
        load_items(f"paco:{tmp_path}")


def test_names_of_pascal_part_in_words():
    unknown = set()
    names = (
        "lfleg rbleg lear rear lebrow lfpa lfho llleg ruarm wheel_12 fwheel fliplate hroofside_2 torso beak lhand odd_1"
    )
    words = "leg leg ear ear eyebrow paw hoof leg arm wheel wheel license-plate roof torso beak hand odd"
    assert [part_word(name, unknown).replace(" ", "-") for name in names.split()] == words.split()
    assert unknown == {"odd"}


def test_pascal_part_joins_both_sides_and_counts_files_that_are_none(tmp_path):
    from scipy.io import savemat

    folder = tmp_path / "Annotations_Part"
    folder.mkdir()
    side = {"part_name": "lear", "mask": np.eye(4, dtype=np.uint8)}
    other = {"part_name": "rear", "mask": np.eye(4, dtype=np.uint8)[::-1]}
    thing = {"class": "cat", "mask": np.ones((4, 4), dtype=np.uint8), "parts": [side, other]}
    bare = {"class": "tvmonitor", "mask": np.ones((4, 4), dtype=np.uint8), "parts": []}
    wing = thing | {"class": "bird", "parts": [side | {"part_name": "lwing"}]}
    savemat(folder / "2008_1.mat", {"anno": {"imname": "2008_1", "objects": [thing, bare]}})
    savemat(folder / "2008_2.mat", {"anno": {"imname": "2008_2", "objects": wing}})
    savemat(folder / "2008_3.mat", {"other": 1})
    (folder / "2008_4.mat").write_bytes(b"MATLAB 5.0 and nothing else")
    for number in (1, 2):
        save(tmp_path / "VOCdevkit" / "VOC2010" / "JPEGImages" / f"2008_{number}.jpg", number)
    root, rows = rows_of(f"pascal-part:{tmp_path}")
    assert [row.id for row in rows.rows] == ["2008_1/0/ear", "2008_2/0/wing"]
    ears = pixels_of(rows.rows[0].fields["part_mask"], root)
    assert ears.tolist() == (np.eye(4) + np.eye(4)[::-1] > 0).tolist()
    told = [each.reason for each in rows.refused.values()]
    assert "2008_3.mat holds no anno" in told[0] and "2008_4.mat cannot be read" in told[1]
    assert len(load_items(folder)) == 2, "the folder of annotations itself"


@pytest.mark.parametrize("name", FORMATS)
def test_masks_are_those_of_the_generated_scenes_to_the_pixel(name, tmp_path):
    export(name, tmp_path / "made", n=6, seed=3)
    pairs = load_pairs("scenes/part", n=6, seed=3)
    scenes = shown_parts(pairs, seed=3, split="test")
    _, rows = rows_of(f"{name}:{tmp_path / 'made'}")
    by_picture = {(row.fields["group"], row.fields["answer"]): row.fields for row in rows.rows}
    groups = list(dict.fromkeys(group for group, _ in by_picture))
    assert len(groups) == len(pairs) == 6
    for group, pair, made in zip(groups, pairs, sample_pairs("part", 6, seed=3, split="test"), strict=True):
        fields = by_picture[group, pair.answer]
        assert fields["category"] == made.question.about[0]
        for mask, shown in (("part_mask", scenes[pair.id].part), ("object_mask", scenes[pair.id].object)):
            assert (pixels_of(fields[mask], tmp_path) == shown).all() and shown.any()


# Through the processor


def test_places_are_those_of_the_same_scenes(tmp_path):
    """On the embedded model: the patches of part and object of each example."""
    vlm = VLM.load("organism", check=False)
    export("paco", tmp_path / "made", n=4, seed=1)
    how = {"seed": 1, "variants": "as-written"}
    made = load_examples(vlm, f"paco:{tmp_path / 'made'}", n=None, **how).examples
    scenes = load_examples(vlm, "scenes/part", n=4, **how).examples
    found = {(each.pair.answer, each.places.part, each.places.object) for each in made}
    assert len(scenes) > 2 and {(each.pair.answer, each.places.part, each.places.object) for each in scenes} <= found


def test_a_mask_is_cropped_as_its_picture_is(vlm, tmp_path):
    """Of 112 x 56 pixels the model sees 28 to 84: what lies left of them is in no patch."""
    parts = [annotation(1, 1, 1, [boxed(0, 0, 56, 56)], 1), annotation(2, 3, 1, [boxed(0, 0, 28, 56)]),
             annotation(3, 4, 1, [boxed(28, 14, 42, 28)]), annotation(4, 2, 4, [boxed(0, 0, 5, 5)]),
             annotation(5, 6, 4, [boxed(0, 0, 5, 5)])]  # fmt: skip
    data = str(paco(tmp_path, parts, size=(112, 56)))
    found = find_data(data)
    assert found is not None
    pairs, shown = about_one_picture(found, data, n=None, seed=0, wording=BARE, fix_labels=False)
    assert [pair.id for pair in pairs] == ["1/star", "1/circle", "4/square part"]
    encoded = vlm.encode(pairs[1].base)
    assert patches_of_mask(encoded, shown["1/circle"].part) == ((1, 0),)
    random = np.random.default_rng(0)
    assert places_of(encoded, shown["1/circle"], min_share=0.5, random=random).object == tuple(
        (row, column) for row in range(4) for column in (0, 1)
    )
    with pytest.raises(UsageError, match="no patch lies in the mask"):
        places_of(encoded, shown["1/star"], min_share=0.25, random=random)


@pytest.mark.parametrize("family", ["llava_next_vicuna", "llava_onevision", "qwen2_5_vl", "llava_clip"])
def test_a_mask_of_run_lengths_finds_its_patches_in_every_view(family, tmp_path):
    """Crops, tiles and merges: pixels of some patches, as PACO has them, are these patches and no other."""
    vlm = VLM(*ZOO[family]("sdpa", 0), check=False)
    encoded = vlm.encode(Prompt("what is it?", picture(3, 112, 56)))
    views = encoded.rows[0].images[0].layout.views
    if family.startswith("llava_"):
        assert len(views) > 1 or family == "llava_clip"
    for number, view in enumerate(views):
        boxes = encoded.boxes(0, view=number)
        cells = [divmod(at, view.grid[1]) for at in range(len(boxes))]
        wanted = [at for at, (row, column) in enumerate(cells) if (row, column) in ((1, 1), (1, 2), (0, 1))]
        shows = np.zeros((56, 112), dtype=bool)
        for at in wanted:
            box = boxes[at]
            shows[round(box.top) : round(box.bottom), round(box.left) : round(box.right)] = True
        counts = [len(list(run)) for run in _runs(shows.ravel(order="F"))]
        mask = pixels_of(CocoMask(({"size": [56, 112], "counts": counts},), 56, 112, "it"), tmp_path)
        assert (mask == shows).all() and wanted
        assert patches_of_mask(encoded, mask, view=number, min_share=0.6) == tuple(cells[at] for at in wanted)


def _runs(flat):
    """Runs of off and on in turn; the first may have no pixel."""
    turns = [0, *(np.flatnonzero(np.diff(flat)) + 1), len(flat)]
    return [[], *np.split(flat, turns[1:-1])] if flat[0] else np.split(flat, turns[1:-1])


# A run


def test_part_ranks_of_pictures_and_their_masks(tmp_path):
    """The command of paper A; a folder of Pascal-Part, and pictures of masks beside `items.jsonl`, ask the same."""
    for format in FORMATS:
        export(format, tmp_path / format, n=2, seed=2)
    data = f"paco:{tmp_path / 'paco'}"
    given = ("--site", "projector.out", "--layers", "all", "--cuts", "V-part", "--variants", "as-written")
    assert command(experiment, "--data", data, *given, "--out", tmp_path / "out") == 0
    result = Result.load(tmp_path / "out")
    assert set(result.table["variant"]) == {"none", "V-part"} and result.table["example"].nunique() >= 3
    assert any("single items; right answers are compared with" in each for each in result.findings)
    expected = asked(data)
    assert len(expected) >= 3
    lines = asked(as_lines(data, tmp_path / "lines"))
    assert lines == expected
    pascal = asked(f"pascal-part:{tmp_path / 'pascal-part'}")
    assert [(each[0], *each[3:]) for each in pascal] == [(each[0], *each[3:]) for each in expected], "options are drawn"


def asked(data):
    """All that a run is made of: answers, the pixels of the pictures, and those of the masks."""
    found = find_data(data)
    assert found is not None
    pairs, shown = about_one_picture(found, str(data), n=None, seed=0, wording=BARE, fix_labels=False)
    masks = [(shown[pair.id].part.tobytes(), shown[pair.id].object.tobytes()) for pair in pairs]
    return [
        (pair.answer, pair.counterfactual_answer, pair.question, load_image(pair.image).tobytes(), *two)
        for pair, two in zip(pairs, masks, strict=True)
    ]


def as_lines(data, folder):
    """The items of a data set as a user has them, masks as pictures."""
    root, rows = rows_of(data)
    lines = []
    for number, row in enumerate(rows.rows):
        line = {name: row.fields[name] for name in ("question", "answer", "options")} | {"id": row.id}
        line["image"] = str(row.fields["image"])
        for name in ("part_mask", "object_mask"):
            line[name] = f"{number} {name}.png"
            folder.mkdir(exist_ok=True)
            Image.fromarray(pixels_of(row.fields[name], root)).save(folder / line[name])
        lines.append(line)
    write_lines(folder / "items.jsonl", lines)
    return folder


def test_items_without_masks_or_options_are_one_line(tmp_path):
    row = {"image": "1.png", "question": "q", "answer": "a", "options": ["a", "b"]}
    save(tmp_path / "1.png", 1)
    masks = {"part_mask": "1.png", "object_mask": "1.png"}
    for rows, said in (
        ([row], "it names no part_mask"),
        ([row | masks | {"options": None}], "it has no options, and no"),
    ):
        write_lines(tmp_path / "items.jsonl", rows)
        found = find_data(tmp_path)
        assert found is not None
        with pytest.raises(UsageError, match=f"none of the 1 items of x has masks of a part and its object: {said}"):
            about_one_picture(found, "x", n=None, seed=0, wording=BARE, fix_labels=False)


def test_formats_with_masks_are_json_of_one_line(tmp_path):
    export("paco", tmp_path / "made", n=2)
    told = json.loads((tmp_path / "made" / "paco_lvis_v1_val.json").read_text())
    kinds = {type(each["segmentation"]["counts"]) for each in told["annotations"]}
    assert kinds == {str, list}, "compressed and not"
