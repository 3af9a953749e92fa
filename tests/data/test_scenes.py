"""Scenes, pictures, questions and counterfactuals: what is claimed of them holds in the pixels."""

import dataclasses
import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest

from vlm_mech.data.counterfactual_scenes import PAIR_SETS, counterfactuals, differing, sample_pairs
from vlm_mech.data.render import blank, masks, render, shared_pixels
from vlm_mech.data.scene_questions import ASKED, PHRASED, SIDES, Question, caption, facts, prior_questions, questions
from vlm_mech.data.scene_sampling import sample_scene, sample_scenes
from vlm_mech.data.scenes import (
    COLOURS,
    FAMILIES,
    PRIORS,
    SPLITS,
    VISIBLE_OVERLAP,
    Scene,
    Thing,
    in_conflict,
    overlapping,
)
from vlm_mech.errors import UsageError

DIGEST = """
import hashlib
from vlm_mech.data.render import render
from vlm_mech.data.scene_sampling import sample_scenes
found = hashlib.sha256()
for scene in sample_scenes(24, seed=3, split="test", conflict=0.5):
    found.update(scene.key.encode() + render(scene).tobytes())
print(found.hexdigest())
"""


def some(n: int, **options) -> list[Scene]:
    return list(sample_scenes(n, seed=11, split="test", **options))


def scene_of(*things: Thing) -> Scene:
    return Scene(things, 228, 7)


def test_the_name_of_a_scene_is_that_of_all_its_fields():
    for scene in sample_scenes(12, seed=0, split="test"):
        whole = repr(dataclasses.astuple(scene)).encode()
        assert scene.key == hashlib.sha256(whole).hexdigest()


def test_a_seed_gives_the_same_pixels_in_every_process():
    other = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True)
    here = hashlib.sha256()
    for scene in sample_scenes(24, seed=3, split="test", conflict=0.5):
        here.update(scene.key.encode() + render(scene).tobytes())
    assert other.stdout == here.hexdigest() + "\n"


def test_scenes_import_neither_torch_nor_transformers():
    code = "import sys, vlm_mech.data.counterfactual_scenes; print({'torch', 'transformers'} & set(sys.modules))"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout == "set()\n"


def test_splits_share_no_scene_whatever_the_seed():
    keys = {split: set() for split in SPLITS}
    for split in SPLITS:
        for seed in (0, 1):
            keys[split] |= {scene.key for scene in sample_scenes(300, seed=seed, split=split)}
    assert not keys["train"] & keys["validation"]
    assert not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]
    assert all(len(found) > 500 for found in keys.values())


def test_the_split_follows_from_the_scene_alone():
    rng = random.Random(5)
    splits = [sample_scene("few", rng).split for _ in range(2000)]
    assert abs(splits.count("train") / 2000 - 0.8) < 0.03
    scene = some(1)[0]
    assert Scene(scene.things, scene.background, scene.grain).split == scene.split == "test"


def test_other_seeds_give_other_scenes():
    one, other = ({scene.key for scene in sample_scenes(200, seed=seed, split="train")} for seed in (0, 1))
    assert not one & other


def test_conflict_is_as_often_as_asked():
    assert not any(in_conflict(scene) for scene in some(200))
    kinds = [thing for scene in some(400, conflict=1.0) for thing in scene.things if thing.kind in PRIORS]
    assert len(kinds) > 100
    assert all(thing.colour != PRIORS[thing.kind] for thing in kinds)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_cover_the_drawn_colour(family):
    for scene in some(15, families=(family,), conflict=0.5):
        picture = np.asarray(render(scene)).astype(float)
        for (number, part), mask in masks(scene).items():
            thing = scene.things[number]
            if thing.species is not None or mask.sum() < 20:
                continue
            wanted = np.array(COLOURS[thing.colours[thing.parts.index(part)]])
            # Shades vary by 12 levels and grain by 5; pixels at the edge are blended, so the middle one of all counts.
            assert np.abs(np.median(picture[mask], axis=0) - wanted).max() < 22


def test_masks_leave_out_what_is_hidden_and_never_overlap():
    back, front = Thing("square", ("red",), "large", 40, 48), Thing("circle", ("blue",), "large", 52, 48)
    scene = scene_of(back, front)
    found = masks(scene)
    alone = masks(scene_of(back))[0, "square"]
    assert not (found[0, "square"] & found[1, "circle"]).any()
    assert found[1, "circle"].sum() == masks(scene_of(front))[0, "circle"].sum()
    assert found[0, "square"].sum() < alone.sum() - VISIBLE_OVERLAP / 2
    assert (found[0, "square"] <= alone).all()


def test_masks_of_parts_are_apart():
    house = Thing("house", ("red", "blue", "yellow"), "big", 48, 48)
    found = masks(scene_of(house))
    assert [part for _, part in found] == ["roof", "wall", "door"]
    assert np.sum(list(found.values()), axis=0).max() == 1
    assert all(mask.sum() > 50 for mask in found.values())


def test_things_outside_their_masks_are_ground():
    scene = some(1, families=("few",))[0]
    picture = np.asarray(render(scene)).astype(float)
    outside = ~np.any(list(masks(scene).values()), axis=0)
    assert np.abs(np.median(picture[outside], axis=0) - scene.background).max() <= 1


def test_occlusion_hides_a_visible_piece():
    for scene in some(30, families=("occlusion",)):
        assert overlapping(*scene.things)
        assert shared_pixels(*scene.things) >= VISIBLE_OVERLAP


def test_every_question_has_one_of_its_options_and_one_answer():
    for scene in some(120, conflict=0.3):
        told: dict[str, set[str]] = {}
        for asked in questions(scene):
            assert asked.answer in asked.options
            told.setdefault(asked.text, set()).add(asked.answer)
        assert all(len(answers) == 1 for answers in told.values())


def test_answers_are_true_of_the_scene():
    circle, star = Thing("circle", ("red",), "small", 20, 30), Thing("star", ("blue",), "small", 70, 60)
    told = {asked.text: asked.answer for asked in questions(scene_of(circle, star))}
    assert told["what colour is the circle?"] == "red"
    assert told["what is the blue object?"] == "star"
    assert told["is the circle left or right of the star?"] == "left"
    assert told["is the star left or right of the circle?"] == "right"
    assert told["is the circle above or below the star?"] == "above"
    assert told["is the star in the left or right half?"] == "right"
    assert told["is the star in the top or bottom half?"] == "bottom"
    assert told["is there any red circle?"] == "yes"
    assert told["is there any blue circle?"] == "no"
    assert "is the circle in front of or behind the star?" not in told


def test_ambiguous_things_are_not_asked_about():
    one, other = Thing("circle", ("red",), "small", 20, 30), Thing("circle", ("blue",), "small", 70, 60)
    told = {asked.text: asked.answer for asked in questions(scene_of(one, other))}
    assert "what colour is the circle?" not in told
    assert told["how many circle objects are there?"] == "two"
    same = scene_of(one, Thing("star", ("red",), "small", 70, 60))
    assert not questions(same, ("kind",))
    level = scene_of(one, Thing("star", ("blue",), "small", 24, 80))
    assert not questions(level, ("left-right",))


def test_relations_hold_on_the_pixels():
    for scene in some(60, families=("few",)):
        found = masks(scene)
        middle = {
            thing.kind: np.argwhere(found[number, thing.kind]).mean(0) for number, thing in enumerate(scene.things)
        }
        for asked in questions(scene, ("left-right", "above-below")):
            axis = 1 if asked.type == "left-right" else 0
            one, other = (middle[kind][axis] for kind in asked.about)
            assert asked.answer == asked.options[0 if one < other else 1]


def test_two_way_answers_are_balanced():
    counts: dict[str, list[str]] = {}
    for scene in some(600):
        for asked in questions(scene, ("presence", "left-right", "above-below", "front-behind", "half")):
            counts.setdefault(asked.type, []).append(asked.options.index(asked.answer))
    for answers in counts.values():
        assert abs(np.mean([answer in (0, "yes") for answer in answers]) - 0.5) < 0.06


def test_facts_and_priors_need_no_picture():
    assert len(facts()) == 8
    assert {asked.about[0]: asked.answer for asked in prior_questions()} == PRIORS
    assert np.ptp(np.asarray(blank())) == 0


def test_captions_name_every_thing_and_seldom_sides():
    rng, sides = random.Random(0), 0
    scenes = some(400, families=("few", "parts", "occlusion"))
    for scene in scenes:
        told = caption(scene, rng)
        sides += " left of " in told or " right of " in told
        assert all(thing.kind in told for thing in scene.things)
        assert all(colour in told for thing in scene.things for colour in thing.colours)
        assert (" in front of " in told or " behind " in told) == (
            len(scene.things) == 2 and overlapping(*scene.things)
        )
    assert 0 < sides / len(scenes) < 0.06


@pytest.mark.parametrize("name", PAIR_SETS)
def test_counterfactuals_change_one_attribute_and_the_answer(name):
    changed = {
        "presence": {"count"},
        "count": {"count"},
        "front-behind": {"order"},
        "left-right": {"place", "x"},
        "above-below": {"place", "y"},
        "kind": {"kind"},
        "phrases": {"place", "colours", "kind"},
    }.get(name, {"colours"})
    for pair in sample_pairs(name, 25, seed=2, split="test"):
        assert pair.scene.split == pair.counterfactual.split == "test"
        assert len(differing(pair.scene, pair.counterfactual)) == 1
        assert pair.attribute in changed
        assert pair.counterfactual_answer != pair.question.answer
        assert {pair.counterfactual_answer, pair.question.answer} <= set(pair.question.options)
        if name != "presence":
            same = [
                asked
                for asked in questions(pair.counterfactual, (pair.question.type,))
                if asked.text == pair.question.text
            ]
            assert {asked.answer for asked in same} == {pair.counterfactual_answer}


def test_counterfactuals_leave_every_other_pixel_as_it_was():
    for pair in sample_pairs("colour", 25, seed=2, split="test"):
        kind = pair.question.about[0]
        here = np.any([mask for (n, _), mask in masks(pair.scene).items() if pair.scene.things[n].kind == kind], axis=0)
        different = (np.asarray(render(pair.scene)) != np.asarray(render(pair.counterfactual))).any(-1)
        # Blended edge pixels lie just outside the mask.
        near = here.copy()
        for step in (1, -1):
            near |= np.roll(here, step, 0) | np.roll(here, step, 1)
            near |= np.roll(np.roll(here, step, 0), 1, 1) | np.roll(np.roll(here, step, 0), -1, 1)
        assert different[here].mean() > 0.99
        assert not different[~near].any()


def test_conflict_pairs_go_from_the_usual_colour_to_another():
    for pair in sample_pairs("colour-conflict", 30, seed=1, split="test"):
        kind = pair.question.about[0]
        assert pair.question.answer == PRIORS[kind]
        assert pair.counterfactual.of_kind(kind)[0].colour == pair.counterfactual_answer != PRIORS[kind]
        assert in_conflict(pair.counterfactual)
        assert not in_conflict(pair.scene)


# Answers of several words


def test_phrases_say_where_things_are():
    heart, star = Thing("heart", ("red",), "small", 20, 30), Thing("star", ("blue",), "small", 70, 50)
    told = {asked.text: asked.answer for asked in questions(scene_of(heart, star), tuple(PHRASED))}
    assert told == {
        "where is the heart?": "left of the star",
        "where is the star?": "right of the heart",
        "what is left of the star?": "the red heart",
        "what is right of the heart?": "the blue star",
        "what is above the star?": "the red heart",
        "what is below the heart?": "the blue star",
    }
    assert not {asked.type for asked in questions(scene_of(heart, star))} & set(PHRASED), "they are asked for by name"


@pytest.mark.parametrize(
    ("others", "asked", "unclear"),
    [
        (((70, 74),), {"what is right of the heart?"}, {"where is the heart?"}),  # as far below as right
        (((38, 32),), set(), {"where is the heart?", "what is right of the heart?"}),  # they touch
        (((70, 50), (80, 84)), {"what is above the star?"}, {"where is the heart?", "what is right of the heart?"}),
        (((72, 30), (30, 74)), set(), {"what is right of the heart?", "what is below the star?"}),  # hardly there
    ],
)
def test_phrases_that_two_people_would_say_otherwise_are_not_asked_for(others, asked, unclear):
    kinds = zip(("star", "ring"), others, strict=False)
    things = [Thing(kind, ("blue",), "small", *place) for kind, place in kinds]
    found = questions(scene_of(Thing("heart", ("red",), "small", 20, 30), *things), tuple(PHRASED))
    assert asked <= {each.text for each in found} and not unclear & {each.text for each in found}


def test_phrases_hold_on_the_pixels():
    """Of two things one lies on that side by far the most; of all things exactly one lies on the side asked about."""
    seen = set()
    for pair in sample_pairs("phrases", 48, seed=4, split="validation"):
        for scene, answer in ((pair.scene, pair.question.answer), (pair.counterfactual, pair.counterfactual_answer)):
            middle = {
                scene.things[number].kind: np.argwhere(mask).mean(0)[::-1] for (number, _), mask in masks(scene).items()
            }
            text = answer if pair.question.type == "where" else pair.question.text.removeprefix("what is ")
            [side] = [each for each in SIDES if text.startswith(each)]
            axis, sign = int(SIDES[side][0] == "y"), SIDES[side][1]
            if pair.question.type == "where":
                one, other = pair.question.text[:-1].split()[-1], answer.split()[-1]
                assert set(middle) == {one, other}
                gap = middle[one] - middle[other]
                assert sign * gap[axis] > abs(gap[1 - axis]) + 4
            else:
                other = pair.question.text[:-1].split()[-1]
                there = [kind for kind in middle if sign * (middle[kind] - middle[other])[axis] > 3]
                [thing] = scene.of_kind(there[0])
                assert len(there) == 1 and answer == f"the {thing.colour} {thing.kind}"
            seen.add(side)
    assert seen == set(SIDES)


def test_phrases_part_at_their_first_word_or_later():
    pairs = sample_pairs("phrases", 40, seed=0, split="test")
    parts = []
    for pair in pairs:
        words = [answer.split() for answer in (pair.question.answer, pair.counterfactual_answer)]
        assert 3 <= len(words[0]) <= 4 and len(words[0]) == len(words[1])
        parts.append([one != other for one, other in zip(*words, strict=True)].index(True))
        assert pair.conflict is None
    assert parts[0::4] == [0] * 10 and parts[1::4] == [1] * 10 and parts[3::4] == [2] * 10
    assert set(parts[2::4]) == {2, 3}, "above the star, left of the star"


def test_the_other_pair_sets_are_what_they_were():
    """Of scenes, questions and answers, as before there were phrases."""
    found = hashlib.sha256()
    for name in PAIR_SETS:
        for pair in sample_pairs(name, 6, seed=0, split="test") if name != "phrases" else ():
            told = (pair.scene, pair.counterfactual, pair.question, pair.counterfactual_answer)
            found.update(repr(told).encode())
    assert found.hexdigest()[:16] == "76daa41df2f91bd1"


def test_a_scene_does_not_differ_from_itself():
    scene = some(1)[0]
    assert differing(scene, scene) == ()
    other = Scene(scene.things, scene.background + 1, scene.grain)
    assert differing(scene, other) == ("ground",)


def test_a_counterfactual_that_would_keep_the_answer_is_not_offered():
    circle = Thing("circle", ("red",), "small", 20, 30)
    asked = Question("what colour is the circle?", "red", "colour", tuple(COLOURS), ("circle",))
    assert {answer for _, answer in counterfactuals(PAIR_SETS["colour"][0], scene_of(circle), asked)} == set(
        COLOURS
    ) - {"red"}


def test_unknown_names_are_refused_with_what_exists():
    with pytest.raises(UsageError, match=r"'holdout' is not known; use one of train, validation, test"):
        next(sample_scenes(1, seed=0, split="holdout"))
    with pytest.raises(UsageError, match=r"'crowd' is not known; use one of single, few"):
        sample_scene("crowd", random.Random(0))
    with pytest.raises(UsageError, match=r"'mood' is not known; use one of colour, kind"):
        questions(some(1)[0], ("mood",))
    with pytest.raises(UsageError, match=r"'shape' is not known; use one of colour, colour-conflict"):
        sample_pairs("shape", 1, seed=0, split="test")
    assert set(ASKED) | set(PHRASED) >= {kind.type for kinds in PAIR_SETS.values() for kind in kinds}
    with pytest.raises(UsageError, match="a house has a colour for each part"):
        _ = Thing("house", ("red", "blue", "yellow"), "big", 48, 48).colour
