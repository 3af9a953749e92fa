"""Single items as pairs: the wrong answer, the picture made, and the same numbers as pairs give."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from experiments import blur_decay, debias, knockout, layer_swap, probing
from tests.helpers import command
from tests.zoo.tiny import picture
from vlm_mech.behaviour.answering.asked_options import others_of
from vlm_mech.data.blur import blurred_out, scaled
from vlm_mech.data.derived_pairs import by_groups, conflict_first, partners, with_conflict
from vlm_mech.data.examples import as_pairs, check_made, holds_items, load_examples
from vlm_mech.data.fitting import askable, fitting
from vlm_mech.data.item import Item
from vlm_mech.data.items import Items
from vlm_mech.data.pair import Pair
from vlm_mech.data.pairs import Pairs, linked, load_pairs
from vlm_mech.data.shared_pictures import pixel_hash
from vlm_mech.data.user_files import Refused
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image
from vlm_mech.methods.attribution.study import attribute
from vlm_mech.methods.knockout.data import scan_of
from vlm_mech.methods.knockout.study import knock_out
from vlm_mech.methods.layer_swap.layer_swap import layer_swap as swapped
from vlm_mech.methods.layer_swap.study import WRONG_ALONE
from vlm_mech.methods.probing import data as probing_data
from vlm_mech.models.vlm import VLM
from vlm_mech.results.result import Result
from vlm_mech.sweeps.measures import logit_diff

COLOURS = ("red", "green", "blue", "yellow")


def item(name="a", **changes):
    """An item with a picture of its own."""
    given = {"image": picture(sum(map(ord, name))), "question": "what colour?", "answer": "red"} | changes
    return Item(name, **given)


def items_of(pairs):
    """The first pictures of pairs as items with the other answer as the usual one."""
    return Items(
        pairs.name,
        tuple(
            Item(pair.id, pair.image, pair.question, pair.answer, prior=pair.counterfactual_answer, conflict=True)
            for pair in pairs
        ),
    )


def pixels(image):
    return np.asarray(load_image(image))


# The wrong answer


@pytest.mark.parametrize(
    ("changes", "foil", "kind"),
    [
        ({"prior": "yellow"}, "yellow", "the usual answer"),
        ({"prior": "yellow", "options": ("red", "yellow", "blue")}, "yellow", "the usual answer"),
        ({"prior": "pink", "options": ("blue", "red")}, "blue", "the other option"),
        ({"prior": "red", "options": ("blue", "red")}, "blue", "the other option"),
        ({"question": "yes?", "answer": "yes", "options": ("yes", "no")}, "no", "the other option"),
        ({}, "green", "another answer to the same question, drawn"),
        ({"question": "and what else?"}, "", "none"),
    ],
)
def test_the_answer_compared_with_is_the_usual_one_else_another_option_else_one_given_elsewhere(changes, foil, kind):
    others = (item("b", answer="green"), item("c", question="how many?", answer="two"))
    pairs = as_pairs(Items("some", (item(**changes), *others)))
    assert pairs[0].counterfactual_answer == foil and f"{kind} (" in pairs.notes[-1]
    assert pairs[1].counterfactual_answer == ("red" if changes == {} else "") or changes
    assert pairs[0].images == pairs[0].own_pictures == pairs[0].pictures and pairs[0].made == "none"


def test_an_answer_that_reads_alike_is_no_wrong_one():
    said = (item("a", answer="red", prior="Red "), item("b", answer=" RED"), item("c", answer="blue"))
    found = [pair.counterfactual_answer for pair in as_pairs(Items("some", said))]
    assert found[:2] == ["blue", "blue"] and found[2] in ("red", " RED")


def test_one_of_several_options_is_drawn_with_the_seed_and_all_are_read():
    items = Items("some", tuple(item(f"i{number}", options=COLOURS) for number in range(40)))
    drawn = [[pair.counterfactual_answer for pair in as_pairs(items, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and {*drawn[0]} == {*COLOURS} - {"red"}
    pair = as_pairs(items)[0]
    assert pair.foils == ("green", "blue", "yellow") and as_pairs(items[:1]).notes[-1].endswith("drawn (1)")
    own = Pair("p", picture(0), picture(1), "q", "red", "blue", options=COLOURS)
    assert own.foils == ("blue",)


def test_what_an_item_says_stays():
    given = {"options": ("red", "blue"), "prior": "blue", "category": "hue", "group": "g", "conflict": True}
    notes, refused = ("known errors",), (Refused("x", "broken"),)
    pairs = as_pairs(Items("some", (item(**given), item("b", conflict=False)), refused, "2 of 3", notes))
    assert [pair.conflict for pair in pairs] == ["first", None] and pairs.drawn == "2 of 3"
    kept = {name: getattr(pairs[0], name) for name in ("options", "prior", "category", "group")}
    assert kept == {name: given[name] for name in kept}
    assert pairs.notes[0] == "known errors" and pairs.refused == refused and pairs.described["counterfactual"] == "none"


# The picture made


def test_pictures_are_made_when_they_are_opened():
    items = Items("some", tuple(item(f"i{number}") for number in range(3)))
    for kind, by_hand in (
        ("blur", lambda image: pixels(blurred_out(image))),
        ("mean", lambda image: np.broadcast_to(np.rint(pixels(image).mean((0, 1))), pixels(image).shape)),
    ):
        for pair in as_pairs(items, kind):
            (made,) = pair.counterfactual_images
            assert not isinstance(made, Image.Image)
            assert np.array_equal(pixels(made), by_hand(load_image(pair.image)))
            assert not np.array_equal(pixels(made), pixels(pair.image))
    assert {as_pairs(items, kind).digest for kind in ("blur", "mean", "none", "other")}.__len__() == 4
    assert all(not pair.counterfactual_images for pair in as_pairs(items, "none"))


def test_a_kernel_grows_with_the_picture_and_stays_odd():
    sizes = [scaled(61, Image.new("RGB", size)) for size in ((448, 10), (20, 896), (112, 112), (16, 16))]
    assert sizes == [61, 121, 17, 3] and scaled(1, Image.new("RGB", (4000, 3000))) == 1


def test_another_items_picture_is_of_another_group_and_of_the_same_size_where_there_is_one():
    sizes = [(20, 20), (20, 20), (30, 20), (30, 20), (30, 20), (40, 40)]
    groups = ["one", "two", "one", "one", "three", "one"]
    made = [
        item(f"i{number}", image=picture(number, *size), group=group)
        for number, (size, group) in enumerate(zip(sizes, groups, strict=True))
    ]
    for seed in range(4):
        pairs = as_pairs(Items("some", tuple(made)), "other", seed=seed)
        for number, pair in enumerate(pairs):
            (lent,) = pair.counterfactual_images
            (owner,) = [at for at, each in enumerate(made) if each.image is lent]
            assert groups[owner] != groups[number]
            assert sizes[owner] == sizes[number] or number == 5
    alone = [dataclasses.replace(each, group="one") for each in made]
    with pytest.raises(UsageError, match=r"no item of some has a counterfactual picture: no other item's picture can"):
        as_pairs(Items("some", tuple(alone)), "other")
    several = Items("some", (item("a", image=(picture(1), picture(2))), item("b"), item("c", group="c")))
    assert [len(pair.counterfactual_images) for pair in as_pairs(several, "other")] == [1, 1]


def test_borrowed_pictures_link_no_groups():
    pairs = as_pairs(Items("some", tuple(item(f"i{number}") for number in range(8))), "other")
    assert {pair.group for pair in linked(pairs)} == {None}
    assert [len(part) for part in by_groups(pairs, (0.5,), seed=0)] == [4, 4]


def test_partners_are_of_other_groups_and_as_before_where_all_differ():
    for seed in range(6):
        assert partners(9, seed=seed, groups=[*"abcdefghi"]) == partners(9, seed=seed)
        groups = [*"aaabbbccde"]
        found = partners(10, seed=seed, groups=groups)
        assert sorted(found) == [*range(10)]
        assert all(groups[one] != groups[other] for one, other in enumerate(found))
        # More than half are of one group: the others lend their pictures more than once.
        found = partners(6, seed=seed, groups=[*"aabaca"])
        assert sorted(found[place] for place in (0, 1, 3, 5)) == [2, 2, 4, 4]
        assert {found[2], found[4]} < {0, 1, 3, 5} and found[2] != found[4]
    with pytest.raises(UsageError, match="all 3 examples are of group 'a'; one of another group is needed"):
        partners(3, seed=0, groups=[*"aaa"])


def test_items_of_one_group_lend_other_pictures():
    """Two items of four show one picture; with no other picture there is no other one's."""
    items = tuple(item(name, image=picture(shown), group="g") for name, shown in zip("abcd", (0, 0, 1, 2), strict=True))
    pairs = as_pairs(Items("some", items))
    for seed in range(6):
        others = others_of(pairs, seed=seed)
        assert all(pixel_hash(one.image) != pixel_hash(other.image) for one, other in zip(pairs, others, strict=True))
    with pytest.raises(UsageError, match="all 2 items of some share an image; another one's is needed"):
        others_of(pairs[:2], seed=0)


# What is refused


@pytest.mark.usefixtures("untyped")
def test_what_is_no_item_and_no_way_to_make_a_picture_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"as_pairs takes Items, not a Pairs; load_items\(folder\) gives some"):
        as_pairs(load_pairs("scenes/colour", n=2))
    with pytest.raises(UsageError, match="counterfactual is 'noise'; other, blur, mean or none is needed"):
        as_pairs(Items("some", (item(),)), "noise")
    with pytest.raises(UsageError, match="counterfactual is 'blur', and scenes/colour holds pairs"):
        load_examples("scenes/colour", n=2, counterfactual="blur")
    with pytest.raises(UsageError, match="pair p: made is 'up'; other, blur, mean, none or null is needed"):
        Pair("p", picture(0), picture(1), "q", "red", "blue", made="up")
    with pytest.raises(
        UsageError, match="item a: conflict is true, and its prior is the answer 'red'; they must differ"
    ):
        item("a", conflict=True, prior="red ")
    with pytest.raises(UsageError, match="1 images and 0 counterfactual images"):
        Pair("p", picture(0), (), "q", "red", "blue")


def test_items_are_not_turned_and_are_in_conflict_with_a_known_prior_alone():
    made = (item("a", conflict=True, prior="blue"), item("b", conflict=True, options=("red", "blue")), item("c"))
    kept = with_conflict(as_pairs(Items("some", made)))
    assert [pair.id for pair in kept] == ["a"] and conflict_first(kept) is kept
    assert [each.reason for each in kept.refused] == [
        "its usual answer is not known; prior is needed, another than the right answer",
        "conflict is not true; an item is needed that contradicts the usual answer",
    ]


# The same numbers


@pytest.fixture(scope="module")
def vlm():
    return VLM.load("organism")


@pytest.fixture(scope="module")
def scenes():
    return conflict_first(load_pairs("scenes/colour-conflict", n=6))


@pytest.fixture(scope="module")
def folder(scenes, tmp_path_factory):
    """The first pictures of the scenes as a user's items."""
    return written(items_of(scenes), tmp_path_factory.mktemp("items"))


def written(items, folder):
    """The items as a folder of the user's own."""
    lines = []
    for number, each in enumerate(items):
        load_image(each.image).save(folder / f"{number}.png")
        fields = {name: getattr(each, name) for name in ("id", "question", "answer", "prior", "conflict")}
        lines.append(json.dumps(fields | {"image": f"{number}.png"}) + "\n")
    (folder / "items.jsonl").write_text("".join(lines))
    return folder


def test_a_knockout_of_items_gives_the_numbers_of_pairs_with_these_pictures(vlm, scenes, folder):
    tables = []
    for pairs in (scenes, load_examples(folder)):
        fitted = fitting(vlm, pairs, variants="as-written", alone=True)
        scan = scan_of(vlm, fitted, {}, ("last<-image",), layers="each", size=1, heads=False, during="prompt")
        tables.append(knock_out(vlm, fitted, scan, only_correct=False)[0])
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert holds_items(folder) and not holds_items("scenes/colour")


def test_a_swap_of_items_gives_the_numbers_of_pairs_with_the_pictures_made(vlm, scenes):
    # The embedded model answers its prior where a picture is in conflict with it, and right elsewhere.
    items = Items("some", (*items_of(scenes).items[:2], *items_of(load_pairs("scenes/colour", n=3)).items))
    made = as_pairs(items, "mean")
    by_hand = [dataclasses.replace(pair, made=None, conflict=None, prior=None) for pair in made]
    how = {"spans": ("image", "last"), "variants": "as-written"}
    tables = [
        swapped(vlm, pairs, **how, only_correct=False).table for pairs in (made, Pairs(made.name, tuple(by_hand)))
    ]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    table = swapped(vlm, made, **how).table
    # The picture of one colour need not be answered with the wrong answer.
    wrong = {pair.id for pair, kept in zip(made, _right(vlm, made), strict=True) if not kept}
    assert {*table.loc[table["skipped"] == WRONG_ALONE, "example"]} == wrong and 0 < len(wrong) < len(made)
    result = swapped(vlm, made, **how)
    assert f"{len(made) - len(wrong)} of {len(made)} items" in result.findings[0]
    assert (
        "a picture of its mean colour" in result.findings[-1] and "a substitute image" in result.provenance["question"]
    )
    with pytest.raises(UsageError, match="it has no counterfactual image; another item's"):
        swapped(vlm, as_pairs(items))


def _right(vlm, pairs):
    from vlm_mech.interventions.trace import generate

    texts = generate(vlm, pairs.base, max_new_tokens=1).texts
    return [text.strip() == pair.answer for text, pair in zip(texts, pairs, strict=True)]


def test_items_in_conflict_are_tuned_on_and_validated_alone(vlm, scenes):
    from vlm_mech.behaviour.debias.data import IN_CONFLICT, tasks_of
    from vlm_mech.behaviour.debias.training import Recipe, lessons_of

    pairs = as_pairs(items_of(scenes))
    assert [*tasks_of(pairs, ())] == [IN_CONFLICT]
    recipe = Recipe("supervised", batch=3)
    lessons = lessons_of(pairs, recipe, 0)
    assert len(lessons) == 3 and {each.truth for each in lessons} <= {*pairs.answer}
    assert len(askable(vlm, pairs, n_new=2)) == len(pairs)


def test_probes_read_an_items_own_picture_and_know_no_object(vlm, scenes):
    pairs = probing_data.with_objects(vlm, as_pairs(items_of(scenes)))
    examples = probing_data.examples_of(vlm, pairs)
    assert examples.ids == tuple(pair.id for pair in scenes) and list(examples.labels) == pairs.answer
    conflicts = probing_data.conflicts_of(vlm, pairs)
    assert list(conflicts.priors) == pairs.counterfactual_answer and conflicts.ids == examples.ids
    with pytest.raises(UsageError, match="span 'object' is where the two images of a pair differ"):
        probing_data.spread(vlm, ("last", "object"), examples)


def test_attribution_takes_items_with_pictures_made(vlm, scenes):
    pairs = as_pairs(items_of(scenes), "blur")[:2]
    sites = [probing_data.Site("llm.resid_post", 1)]
    measure = logit_diff(pairs.answer, pairs.counterfactual_answer)
    assert len(attribute(vlm, pairs, sites, ["image"], measure, top_k=1, n_random=1).screen.table)


def test_answers_are_read_among_all_options_of_an_item(vlm, scenes, tmp_path):
    from vlm_mech.behaviour.blur_decay.study import OWN, STRANGER, WHOLE, decay, guessing

    pairs = fitting(vlm, as_pairs(items_of(scenes)), spoken=True, alone=True, variants="as-written")
    levels = ("1", "61", "mean colour")
    mine, theirs = decay(vlm, pairs, levels), decay(vlm, scenes, levels)
    rows = theirs[theirs["view"].isin([OWN, STRANGER])].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, rows, check_exact=True)
    assert set(mine["layer"]) == {WHOLE}
    four = as_pairs(Items("some", (item("a", options=COLOURS), item("b", options=("red", "blue")))))
    assert guessing(four, levels) == {"same": [1.0, 0.375, 0.375], "unchanged": [1.0, 0.375, (1 / 16 + 1 / 4) / 2]}
    assert guessing(as_pairs(Items("some", (item(),))), levels) is None
    assert guessing(as_pairs(Items("some", (item(prior="blue"),))), levels) is None, "a prior is no option"


# The commands


def test_commands_take_items_and_say_what_they_compare(folder, tmp_path, capsys):
    few = ("--n", "3", "--out", tmp_path / "out", "--overwrite")
    assert command(layer_swap, "--data", folder, *few) == 2
    assert "holds single items, and a swap of states needs a counterfactual picture" in capsys.readouterr().err
    assert command(layer_swap, "--counterfactual", "blur", *few) == 2
    assert "scenes/colour holds pairs" in capsys.readouterr().err
    swap = ("--data", folder, "--counterfactual", "other", "--site", "projector", "--all")
    assert command(layer_swap, *swap, *few) == 0
    assert Result.load(tmp_path / "out").provenance["data"]["counterfactual"] == "other"
    once = ("--layers", "all", "--edges", "last<-image", "--all")
    assert command(knockout, "--data", folder, *once, *few) == 0
    said = Result.load(tmp_path / "out").findings[-1]
    assert said.endswith("single items; right answers are compared with: the usual answer (3).")
    decayed = ("--data", folder, "--kernels", "1", "61", "--long-side", "none", "--scaled")
    assert command(blur_decay, *decayed, *few) == 0
    result = Result.load(tmp_path / "out")
    assert "Items have no counterfactual image" in " ".join(result.findings)
    assert result.provenance["guessing"] is None, "they have a usual answer, but no options"
    assert command(blur_decay, *decayed, "--long-side", "-3", *few) == 2
    assert "a number of pixels, or none, is needed" in capsys.readouterr().err
    assert command(blur_decay, *decayed, "--mechanism", "1", *few) == 2
    assert "--mechanism 1 needs a counterfactual picture: --counterfactual" in capsys.readouterr().err
    assert command(blur_decay, *decayed, "--probe-data", "scenes/colour", *few) == 2
    assert "the two images of a pair differ; single items do not say it" in capsys.readouterr().err
    check_made("scenes/colour", None, "it")


def test_a_dry_run_says_what_is_given_and_which_picture_is_made(folder, capsys):
    few = ("--n", "3", "--dry-run")
    assert command(layer_swap, "--data", folder, "--counterfactual", "blur", *few) == 0
    told = capsys.readouterr().out.splitlines()[0]
    assert told.startswith(f"{folder}: single items (items.jsonl); counterfactual image: the same picture, blurred")
    assert command(knockout, "--data", folder, *few) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{folder}: single items (items.jsonl)"
    assert command(knockout, *few) == 0
    assert capsys.readouterr().out.splitlines()[0] == "scenes/colour: pairs of scenes"


def test_debias_and_probing_take_items(tmp_path, capsys):
    folder = written(items_of(conflict_first(load_pairs("scenes/colour-conflict", n=30))), tmp_path)
    tuned = ("--objective", "supervised", "--steps", "2", "--every", "1", "--untouched", "none")
    assert command(debias, "--data", folder, *tuned, "--out", tmp_path / "debias") == 0
    result = Result.load(tmp_path / "debias")
    assert set(result.table["task"]) == {"in conflict"} and "Single items have no usual images" in result.findings[0]
    assert any(f"--data {folder} shows in which blocks" in each for each in result.findings)
    probes = ("--probes", "linear", "--controls", "shuffled", "--seeds", "1", "--folds", "3", "--every", "9")
    probes = (*probes, "--grouping", "scene")
    answered = command(probing, "--data", folder, "--conflict", "none", *probes, "--out", tmp_path / "probing")
    said = capsys.readouterr()
    assert answered == 0 or "too few for every training part" in said.err


def test_probing_of_items_tells_what_is_left_out(tmp_path):
    """No span of what is asked about, and no usual answer where no pictures in conflict are read."""
    folder = written(items_of(load_pairs("scenes/left-right", n=16)), tmp_path)
    probes = ("--probes", "linear", "--controls", "shuffled", "--seeds", "1", "--every", "9", "--grouping", "scene")
    assert command(probing, "--data", folder, *probes, "--out", tmp_path / "out") == 0
    result = Result.load(tmp_path / "out")
    assert [each.name for each in result.metrics] == ["accuracy", "p_true"]
    assert {*result.summary()["metric"]} == {"accuracy", "p_true"} and {*result.table["span"]} == {"last", "image"}
    said = " ".join(result.findings)
    assert "No images in conflict were given" in said and "single items; each is labelled with its answer" in said
    assert "(no span object)" in said and "compared with" not in said


def test_the_floor_of_pairs_that_share_a_picture_is_of_another_group():
    """As in HallusionBench, where several questions are about one set of figures."""
    pairs = Pairs(
        "made",
        tuple(
            Pair(f"p{n}", picture(n // 2), picture(9 + n // 2), f"q{n}", "a", "b", group=f"g{n // 2}") for n in range(8)
        ),
    )
    for seed in range(5):
        others = others_of(pairs, seed=seed)
        assert all(one.group != other.group for one, other in zip(pairs, others, strict=True))
        assert sorted(each.id for each in others) == [pair.id for pair in pairs], "each lends its pictures once"
