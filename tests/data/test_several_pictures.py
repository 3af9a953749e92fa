"""Pairs whose prompts show several pictures: read from a folder, asked of models, and refused where one is needed."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.runs import fake_run
from tests.zoo import ZOO
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site, sites
from vlm_mech.behaviour.blur_decay.blur import NONE
from vlm_mech.behaviour.blur_decay.data import asked_at, ladder, with_images
from vlm_mech.behaviour.erroneous_agreement.data import load_cases
from vlm_mech.behaviour.scoring.data import _check_captions
from vlm_mech.data.derived_pairs import about_others, apart, turned
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import Pair, Pairs, linked, load_pairs, pictures
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image, side_by_side
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span_kinds import OneImage
from vlm_mech.methods.compensation.data import examples_of
from vlm_mech.methods.knockout import figures as knockout_figures
from vlm_mech.methods.knockout.data import scan_of
from vlm_mech.methods.knockout.edges import object_masks
from vlm_mech.methods.knockout.follow_up import FollowUp, Head, attention_of
from vlm_mech.methods.layer_swap.layer_swap import layer_swap
from vlm_mech.methods.lens.logit_lens import lens
from vlm_mech.methods.lens.patch_words import patch_words
from vlm_mech.methods.probing.controls import _blanked
from vlm_mech.methods.probing.data import OBJECT, Spot, changed_patches, probe_sites, read_states, spread
from vlm_mech.methods.probing.data import examples_of as probe_examples
from vlm_mech.methods.probing.descent import ProbeRecipe
from vlm_mech.methods.probing.figures import patch_picture
from vlm_mech.methods.probing.patch_map import patch_map
from vlm_mech.methods.probing.training import Split
from vlm_mech.models.dual_encoder import DualEncoder
from vlm_mech.models.vlm import VLM
from vlm_mech.runs.ingredients import ingredients

SEVERAL = ["llava_clip", "qwen2_vl", "idefics3", "gemma3", "internvl"]


def wrapped(family):
    return VLM(*ZOO[family]("sdpa", 0), name=family, check=False)


def patched(seed, corner):
    """A picture, and the same with one corner black."""
    image = np.asarray(picture(seed)).copy()
    image[corner[0] : corner[0] + 14, corner[1] : corner[1] + 14] = 0
    return Image.fromarray(image)


def two(**changes):
    """One pair whose second picture alone differs."""
    given = {"image": (picture(1), picture(2)), "counterfactual_image": (picture(1), patched(2, (0, 0)))}
    return Pair(
        "a", question="what colour is the second?", answer="red", counterfactual_answer="blue", **given | changes
    )


def folder_of(tmp_path, *lines):
    for seed in range(6):
        picture(seed).save(tmp_path / f"{seed}.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    asked = {"question": "what is it?", "answer": "red", "counterfactual_answer": "blue"}
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(asked | line) for line in lines))
    return tmp_path


GOOD = {"images": ["0.png", "1.png"], "counterfactual_images": ["0.png", "2.png"]}


def test_a_line_may_name_several_pictures(tmp_path):
    found = load_pairs(folder_of(tmp_path, GOOD, {"image": "3.png", "counterfactual_image": "4.png"}))
    assert [len(pair.images) for pair in found] == [2, 1] and not found.refused
    assert [load_image(image).tobytes() for image in found[0].counterfactual_images] == [
        load_image(tmp_path / name).tobytes() for name in ("0.png", "2.png")
    ]
    assert len(found.base[0].images) == 2 and found.counterfactual[0].images == found[0].counterfactual_images
    one = load_pairs(folder_of(tmp_path, GOOD | {"images": ["3.png"], "counterfactual_images": ["4.png"]}))
    assert one.digest == load_pairs(folder_of(tmp_path, {"image": "3.png", "counterfactual_image": "4.png"})).digest


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"images": ["0.png"], "counterfactual_images": ["1.png", "2.png"]},
         "line 1: 1 images and 2 counterfactual_images; as many of both are needed"),
        (GOOD | {"image": "0.png"}, "line 1: both image and images are given; one of them is needed"),
        (GOOD | {"images": []}, "line 1: images is []; a list of at least one image is needed"),
        (GOOD | {"images": "0.png"}, "line 1: images is '0.png'; a list of at least one image is needed"),
        (GOOD | {"images": ["0.png", 3]}, "line 1: number 1 of images is 3; an image is needed"),
        (GOOD | {"images": ["0.png", "bad.png"]}, "bad.png"),
        (GOOD | {"images": ["0.png", "none.png"]}, "none.png"),
        (GOOD | {"counterfactual_images": ["0.png", "1.png"]}, "both sides show equal pixels"),
        ({"images": ["0.png", "1.png"]}, "line 1: counterfactual_image is missing; an image is needed"),
    ],
)  # fmt: skip
def test_lines_that_cannot_be_used_are_counted_with_the_reason(tmp_path, line, reason):
    found = load_pairs(folder_of(tmp_path, line, GOOD))
    assert len(found) == 1 and len(found.refused) == 1
    told = found.refused[0].reason
    assert "\n" not in told and reason in told


def test_every_picture_counts_in_digests_groups_and_ingredients(tmp_path):
    lines = GOOD, {"images": ["3.png", "5.png"], "counterfactual_images": ["4.png", "5.png"]}
    found = load_pairs(folder_of(tmp_path, *lines))
    shared = {"images": ["3.png", "2.png"], "counterfactual_images": ["4.png", "2.png"]}
    linked_by_second = load_pairs(folder_of(tmp_path, GOOD, shared))
    assert len({pair.group or pair.id for pair in found}) == 2
    assert len({pair.group or pair.id for pair in linked_by_second}) == 1
    assert len({found.digest, linked_by_second.digest}) == 2
    before = ingredients({"data": str(tmp_path)}, besides=tmp_path / "out")
    picture(9).save(tmp_path / "2.png")
    assert ingredients({"data": str(tmp_path)}, besides=tmp_path / "out") != before
    others = Pairs("others", (Pair("z", picture(7), picture(2), "what?", "red", "blue"),))
    with pytest.raises(UsageError, match="it shows an image of pair z of others"):
        apart(Pairs("mine", (two(),)), others)


def test_pairs_check_their_pictures():
    for changes in ({"image": picture(1)}, {"image": (), "counterfactual_image": ()}, {"image": (picture(1),) * 3}):
        with pytest.raises(UsageError, match="as many of both are needed, one at least"):
            two(**changes)
    pairs = Pairs("mine", (two(),))
    assert turned(pairs)[0].images[1].tobytes() == two().counterfactual_images[1].tobytes()
    assert about_others(pairs, [two(image=(picture(4), picture(5)))])[0].images[0].tobytes() == picture(4).tobytes()
    (_, shown), _ = pictures(pairs)
    assert shown.width > 2 * 56 and shown.height == 56
    assert side_by_side([picture(1)]).tobytes() == picture(1).tobytes()
    assert np.array_equal(np.asarray(shown)[:, -56:], np.asarray(picture(2)))
    assert len(linked(pairs)) == 1


@pytest.mark.parametrize("family", SEVERAL)
def test_what_changed_lies_in_the_picture_that_changed(family):
    vlm = wrapped(family)
    changed = changed_patches(vlm, two())
    assert changed.image == 1
    alone = changed_patches(vlm, two(image=picture(2), counterfactual_image=patched(2, (0, 0))))
    encoded = vlm.encode(two().base)
    assert set(encoded.positions(changed)) < set(encoded.positions(OneImage(1)))
    assert changed.cells == alone.cells
    with pytest.raises(UsageError, match="pair a: 2 of its 2 images differ; one alone is needed"):
        changed_patches(vlm, two(image=(picture(5), picture(2))))


@pytest.mark.parametrize("family", SEVERAL[:3])
def test_a_swap_over_several_pictures_is_that_of_all_their_tokens(family):
    vlm = wrapped(family)
    assert len(fitting(vlm, Pairs("mine", (two(),)))) == 1
    result = layer_swap(vlm, Pairs("mine", (two(), _renamed("b"))), spans=("image", "all"), only_correct=False)
    rows = result.table[(result.table["span"] == "all") & (result.table["layer"] == 0)]
    assert np.allclose(rows["recovered"].dropna(), 1, atol=1e-3)


def _renamed(name):
    pair = two(image=(picture(3), picture(2)), counterfactual_image=(picture(3), patched(2, (28, 28))))
    return Pair(name, pair.image, pair.counterfactual_image, pair.question, pair.answer, pair.counterfactual_answer)


def test_models_of_one_picture_refuse_such_pairs_in_one_line():
    vlm = wrapped("blip2")
    with pytest.raises(UsageError, match=r"none of the 1 pairs of mine fits blip2: .* takes one image a prompt"):
        fitting(vlm, Pairs("mine", (two(),)))


def test_probes_read_and_blank_every_picture():
    vlm = wrapped("llava_clip")
    examples = probe_examples(vlm, Pairs("mine", (two(),)))
    assert [span.image for span in examples.objects] == [1, 1] and probe_sites(vlm)
    (first, _) = _blanked(examples.prompts)
    assert len(first.images) == 2 and len(set(load_image(first.images[0]).getdata())) == 1
    assert len(spread(vlm, ("each",), examples)) == len(vlm.encode(two().base).positions(OneImage(0)))


def test_all_pictures_of_a_prompt_are_blurred():
    pairs = Pairs("mine", (two(),))
    level = with_images(pairs, "11")[0]
    for number, image in enumerate(two().images):
        alone = with_images(Pairs("one", (two(image=image, counterfactual_image=picture(8)),)), "11")[0]
        assert level.images[number].tobytes() == alone.image.tobytes()
    assert [len(prompt.images) for prompt in asked_at(pairs, "11")] == [2]
    (pair, name, shown), *_ = ladder(pairs, ["1", "11", NONE])
    assert (pair.id, name) == ("a", "1") and shown.width > 2 * 448


def test_what_is_made_for_one_picture_says_so(tmp_path):
    folder = folder_of(
        tmp_path, GOOD | {"id": "a", "object": [0, 0, 9, 9]}, {"image": "3.png", "counterfactual_image": "4.png"}
    )
    with pytest.raises(UsageError, match="pair a: object is in pixels of one image, and the prompt shows 2"):
        object_masks(load_pairs(folder), seed=0, split="test")
    cases = load_cases(str(folder), n=None, seed=0, split="test", template="{question} {answer}")
    assert [each.reason for each in cases.refused] == [
        "it shows 2 images in one prompt; a contrastive model compares one"
    ]
    assert len(cases.cases) == 1
    with pytest.raises(UsageError, match="a contrastive model compares one"):
        _check_captions(DualEncoder.load("clip"), two(), "mine", "a {answer} cat")
    vlm = wrapped("llava_clip")
    with pytest.raises(UsageError, match="it shows 2 images in one prompt; masks of a part and its object are of one"):
        examples_of(vlm, Pairs("mine", (two(),)), {}, min_share=0.2)


def test_maps_over_one_of_several_pictures_say_which(tmp_path):
    vlm, pairs = (
        wrapped("llava_clip"),
        Pairs("mine", (two(), *map(_renamed, "bcd"))),
    )
    prompts = [Prompt("what is it?", (picture(1), picture(2))), Prompt("what is it?", picture(3))]
    found = lens(vlm, prompts, sites("llm.resid_post", [3]), "image")
    titles = [patch_words(vlm, found, **which).layout.title.text for which in ({}, {"image": 1}, {"example": 1})]
    assert titles == [f"logit lens: what is it?{end}" for end in (" (picture 1 of 2)", " (picture 2 of 2)", "")]

    heads = (Head(1, 0),)
    cut = scan_of(vlm, pairs, {}, ("last<-image",), heads=True)
    maps = attention_of(vlm, pairs, cut.edges[0], heads, {}, n_maps=1)
    ((caption, shown),) = knockout_figures.pictures(pairs, cut, FollowUp(heads, maps))
    assert caption.startswith("what colour is the second? red (picture 1 of 2) - layer 1 head 0, from last: ")
    assert "% on the images, brightest patch" in caption and shown.height == shown.width

    examples, spot = probe_examples(vlm, pairs), Spot(Site("projector.out"), OBJECT)
    features = {spot: read_states(vlm, examples.prompts, examples.objects, [spot], folder=tmp_path / "read")[spot]}
    parts = Split(np.arange(4), np.arange(4, 6), np.arange(6, 8))
    labels = np.arange(8) % 2
    step = {"model": vlm.name, "map": patch_map(
        vlm, examples, labels, ("red", "blue"), features, parts, ProbeRecipe(max_epochs=1), folder=tmp_path
    )}  # fmt: skip
    title = patch_picture(fake_run.swap_result(2, provenance={"steps": [step]}), model=vlm.name).layout.title.text
    assert title.endswith(" (picture 1 of 2)")
