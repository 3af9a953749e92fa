"""Directions: found where they were planted, in parts that share nothing, as long as said, kept in a file, refused."""

import dataclasses
import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from tests.zoo import FEW
from tests.zoo.batches import batch, wrapped
from vlm_mech import VLM, Direction, Pair, Pairs, UsageError, dose_response, find_direction, load_pairs
from vlm_mech.architectures.site import Site
from vlm_mech.data.derived_pairs import turned
from vlm_mech.data.fitting import fitting
from vlm_mech.interventions.specification import Steer
from vlm_mech.interventions.trace import run
from vlm_mech.methods.gates.gated import Options, gated
from vlm_mech.methods.steering.claims import NOTHING, again, edit_of, pool_of
from vlm_mech.methods.steering.claims import pool as every_claim
from vlm_mech.methods.steering.data import AGAINST, DOSES, Contrast, contrast_of, oriented, three_parts
from vlm_mech.methods.steering.find import parts_of, steering_of
from vlm_mech.methods.steering.side_effects import repetition, side_effects, spoken
from vlm_mech.methods.steering.states import FOUND, Differences, Place, differences
from vlm_mech.methods.steering.study import least_squares, result_of, slopes, steered
from vlm_mech.models.twin import twin_of
from vlm_mech.organism.planted import plant
from vlm_mech.organism.planted_draw import draw
from vlm_mech.sweeps.engine import Engine

SMALL = (-1.0, -0.5, 0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def organism():
    return VLM.load("organism", check=False)


@pytest.fixture(scope="module")
def sides(organism):
    """Pairs with the answers left and right."""
    return fitting(organism, load_pairs("scenes/left-right", n=30))


@pytest.fixture(scope="module")
def direction(organism, sides):
    """That of left over right at the last token."""
    return find_direction(organism, sides, layers=[3], spans="last", doses=SMALL)


@pytest.fixture(scope="module")
def planted():
    """A planted model in which one head reads the picture and nothing suppresses it, with that head's layer."""
    seeds = (draw(seed) for seed in range(100))
    recipe = next(
        each
        for each in seeds
        if each.route == "direct" and not each.suppressor and 1 < each.reads[0].layer < each.n_layers - 2
    )
    return plant(recipe, check=False), recipe.reads[0].layer


@pytest.fixture(scope="module")
def planted_steering(planted):
    model, layer = planted
    parts = parts_of(fitting(model.vlm, model.pairs(120, seed=3)), "red", (0.5, 0.2))
    places = {"layers": [layer - 2, layer - 1, layer, layer + 1], "spans": ("last", "image")}
    return parts, steering_of(model.vlm, parts, **places, doses=(-2.0, 0.0, 2.0), n_random=4, n_others=2)


def test_what_is_found_above_the_reading_head_is_the_planted_direction(planted, planted_steering):
    """What the head would read as red, less the mean of the colours that it is paired with."""
    (model, layer), (parts, steering) = planted, planted_steering
    ids = {each: model.vlm.tokenizer.convert_tokens_to_ids(each) for each in model.recipe.answers}
    head = model.vlm.model.lm_head.weight.detach().float()
    others = torch.stack([head[ids[answer]] for answer in parts.train.counterfactual_answer]).mean(0)
    planted_one = head[ids["red"]] - others
    cosine = {
        place.layer: float(torch.cosine_similarity(each.vector, planted_one, dim=0))
        for place, each in steering.found.items()
        if place.span == "last"
    }
    assert min(cosine[layer], cosine[layer + 1]) > 0.98
    assert max(abs(cosine[layer - 1]), abs(cosine[layer - 2])) < 0.6


def test_steering_turns_answers_where_it_can_and_nowhere_else(planted, planted_steering):
    """The last token from the reading head on, the image before it; after it nobody looks at the image any more."""
    (model, layer), (parts, steering) = planted, planted_steering
    assert (steering.place.span == "image" and steering.place.layer < layer) or steering.place.layer >= layer
    table, _ = steered(model.vlm, parts.test, dataclasses.replace(steering, dose=2.0), _both(steering), check=0)
    said = table[table["picture"] == AGAINST].groupby(["span", "layer", "dose"])["says_toward"].mean()
    moved = (table["logit_diff"] - table["logit_diff_baseline"]).abs().groupby([table["span"], table["layer"]]).max()
    for below, above in ((layer - 2, layer), (layer - 1, layer + 1)):
        assert said["last", above, 2.0] > 0.9 and said["last", below, 2.0] < 0.1
        assert said["image", below, 2.0] > 0.9 and said["image", above, 2.0] < 0.1
        assert said["last", above, -2.0] == 0
        assert moved["image", above] < 0.05 * moved["image", below]


def _both(steering):
    """Every place, both ways."""
    return dataclasses.replace(steering, dose=2.0, controls={}).points()


def test_dose_0_is_no_edit_and_others_are_as_long_as_said(organism, sides, direction):
    encoded = organism.encode(sides.base[:4])
    zero, half = run(organism, encoded, direction.edit(0.0)), direction.edit(0.5)
    assert torch.equal(zero.logits, run(organism, encoded).logits)
    assert isinstance(half, Steer) and half.site == Site("llm.resid_post", 3)
    added = half.scale * half.vector
    assert float(added.norm()) == pytest.approx(0.5 * direction.norm, rel=1e-5)
    (found,) = differences(organism, parts_of(sides).train, [Place("last", 3)]).values()
    lengths = [float(each.norm()) for each in found.controls(20, 5, seed=1).values()]
    assert len(lengths) == 30 and lengths == pytest.approx([float(found.vector.norm())] * 30, rel=1e-4)
    along = found.controls(1, 5, seed=1)["orthogonal 4"] @ found.vector
    assert abs(float(along)) < 1e-3 * float(found.vector.norm()) ** 2
    assert torch.allclose(found.vector, direction.vector, atol=1e-4)


@pytest.mark.parametrize("family", FEW)
def test_in_every_family_a_dose_of_0_changes_nothing_and_the_engine_gives_the_others(family):
    vlm, norm = wrapped(family), 3.0
    encoded, site = vlm.encode(batch(1)), Site("llm.resid_post", 1)
    plain, edits = run(vlm, encoded), []
    vector = torch.randn(vlm.width(site), generator=torch.Generator().manual_seed(2))
    control = Differences(Place("last", 1), vector[None], norm).controls(1, 0, seed=0)["random 0"]
    for span in ("last", "image", "image+last"):
        found = Direction(vector, site, span, norm=norm, dose=1.0, n=2)
        for each in (found, found.with_vector(control)):
            assert torch.equal(run(vlm, encoded, each.edit(0.0), baseline=plain).logits, plain.logits), span
            edits += [each.edit(), each.edit(-0.5)]
            assert [float(one.scale * one.vector.norm()) for one in edits[-2:]] == pytest.approx([norm, -0.5 * norm])
    logits, _ = Engine(vlm, encoded).answers(edits)
    for one, edit in zip(logits, edits, strict=True):
        expected = run(vlm, encoded, edit, baseline=plain).last
        assert (one - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
        assert not torch.equal(expected, plain.last)


def test_random_directions_do_nothing_in_the_mean_and_the_found_one_beats_them_all(organism, sides, direction):
    parts = parts_of(sides)
    (pair_ids,) = {len({pair.id for pair in parts.every})}
    assert pair_ids == sum(parts.counts.values())
    result = dose_response(organism, direction, parts.test, doses=SMALL, n_random=20, n_orthogonal=3)
    table = slopes(result, {"span": "last", "layer": 3})
    for picture, rows in table.groupby("picture"):
        random = rows.loc[rows["direction"].str.startswith("random"), "slope"]
        (own,) = rows.loc[rows["direction"] == FOUND].to_dict("records")
        error = random.std() / len(random) ** 0.5
        assert abs(random.mean()) < 3 * error and own["slope"] > 2 * random.abs().max(), picture
        assert own["beaten_by"] == pytest.approx(1 / 21) and own["anti_steerable"] == 0 and own["spearman"] > 0.9
    unsteered = result.table[result.table["dose"] == 0]
    assert (unsteered["logit_diff"] - unsteered["logit_diff_baseline"]).abs().max() < 1e-4
    assert any("0 of 20 random directions" in each for each in result.findings)
    assert result.claims == () and not any("claim" in each for each in result.findings), "none is looked for"


def test_slopes_are_those_of_least_squares():
    doses, values = np.array([-1.0, 0.0, 2.0]), np.random.default_rng(0).normal(size=(5, 3))
    expected = [np.polyfit(doses, row, 1)[0] for row in values]
    assert least_squares(doses, values) == pytest.approx(expected)
    table = pd.DataFrame(
        {
            "example": list("aabb") * 1, "group": list("aabb"), "direction": FOUND, "picture": AGAINST, "span": "last",
            "layer": 0, "dose": [-1.0, 1.0] * 2, "logit_diff": [0.0, 2.0, 3.0, -1.0],
        }
    )  # fmt: skip
    for name in ("logit_diff", "says_toward", "right"):
        table = (
            table.assign(**{f"{name}_baseline": 0.0})
            if name == "logit_diff"
            else table.assign(**{name: 0.0, f"{name}_baseline": 0.0})
        )
    (row,) = slopes(result_of(table, "logit_diff", {}), {"span": "last", "layer": 0}).to_dict("records")
    assert (row["slope"], row["anti_steerable"], row["spearman"], row["n"]) == (-0.5, 0.5, 0.0, 2)


def test_parts_share_no_group(sides):
    grouped = [dataclasses.replace(pair, group=f"{number // 3}") for number, pair in enumerate(sides)]
    parts = three_parts(dataclasses.replace(sides, pairs=tuple(grouped)), (0.4, 0.2), seed=1)
    groups = [{pair.group for pair in part} for part in parts]
    assert sum(map(len, groups)) == 10 and not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert sum(map(len, parts)) == len(sides)


def test_contrasts(sides):
    assert contrast_of(sides) == Contrast("left", "right")
    assert all(pair.answer == "left" for pair in oriented(sides, Contrast("left", "right")))
    assert all(pair.answer == "right" for pair in oriented(sides, contrast_of(sides, "right/left")))
    conflict = load_pairs("scenes/colour-conflict", n=4)
    shown = oriented(turned(conflict), contrast_of(conflict))
    assert contrast_of(conflict).pooled and {pair.conflict for pair in shown} == {"first"}
    colours = load_pairs("scenes/colour", n=12)
    one = contrast_of(colours)
    kept = oriented(colours, one)
    assert not one.over and {pair.answer for pair in kept} == {one.toward}
    assert len(kept) + len(kept.refused) == 12


def test_a_direction_is_kept_whole(direction, tmp_path):
    direction.save(tmp_path / "it.safetensors")
    again = Direction.load(tmp_path / "it.safetensors")
    for field in dataclasses.fields(Direction):
        if field.name != "vector":
            assert getattr(again, field.name) == getattr(direction, field.name), field.name
    assert torch.equal(again.vector, direction.vector)
    assert again.contrast == "left/right" and again.n == len(again.parts["train"]) and again.told["test"]
    assert "last at llm.resid_post" in repr(again)
    assert not set(again.parts["train"]) & set(again.parts["test"])


def test_claims_hold_for_the_organism_and_not_for_random_weights(organism):
    pairs = fitting(organism, load_pairs("scenes/left-right", n=60))
    asked = Options("none", 0, 0, 32)
    made = [_claimed(vlm, pairs, asked) for vlm in (organism, twin_of(organism, 3))]
    assert {claim.kind for claim in made[0]} == {"raises", "lowers"} and made[1] == []
    assert _claimed(organism, pairs, asked, n_random=19) == []


def _claimed(vlm, pairs, asked, n_random=20):
    parts = parts_of(pairs)
    steering = steering_of(
        vlm, parts, layers=[3], spans=("last",), doses=(-2.0, 0.0, 2.0), n_random=n_random, n_others=2
    )
    table, _ = steered(vlm, parts.test, steering, steering.points(), check=0)
    result = result_of(table, "logit_diff", {})
    found = gated(asked, vlm, parts.test, result, pool_of(steering, 6), "not done again", edit_of(steering))
    return [claim for claim in found if claim.made]


def test_nulls_find_the_direction_anew(organism, sides):
    """Of shuffled labels, and in shuffled weights, it does less; in other words it does what it did."""
    parts = parts_of(sides)
    steering = steering_of(organism, parts, layers=[3], spans=("last",), doses=SMALL, n_random=2, n_others=0)
    steering = dataclasses.replace(steering, dose=1.0)
    measured = again(organism, parts.train, parts.test, steering, {})
    worded = parts.test.worded(dataclasses.replace(parts.test[0].wording, template="{question} Answer:"))
    shuffled = dataclasses.replace(parts.test, pairs=tuple(dataclasses.replace(pair) for pair in parts.test))
    effects = [
        _effect(measured(vlm, pairs))
        for vlm, pairs in (
            (organism, parts.test), (organism, worded), (organism, shuffled), (twin_of(organism, 1), parts.test)
        )
    ]  # fmt: skip
    assert effects[0] > 2 and effects[1] > 0.5 * effects[0]
    assert max(abs(effects[2]), abs(effects[3])) < 0.75 * effects[0]


def _effect(table):
    rows = table[(table["direction"] == FOUND) & (table["dose"] > 0)]
    return (rows["logit_diff"] - rows["logit_diff_baseline"]).mean()


def test_that_nothing_moves_is_asked_of_many_alone(organism, sides):
    parts = parts_of(sides)
    steering = steering_of(organism, parts, layers=[3], spans=("last", "image"), doses=SMALL, n_random=1, n_others=0)
    table, _ = steered(organism, parts.test, steering, steering.points(), check=0)
    copies = [table.assign(example=table["example"] + f"/{n}", group=table["group"] + f"/{n}") for n in range(11)]
    few, many = (result_of(pd.concat(some, ignore_index=True), "logit_diff", {}) for some in (copies[:1], copies))
    pool = partial(every_claim, place=steering.place, dose=steering.dose, last=5)
    assert not pool_of(steering, 6)(many), "one random direction is too few for a claim"
    assert many.table["group"].nunique() >= 128
    assert not [claim for claim in pool(few) if claim.kind == NOTHING]
    denied = [claim for claim in pool(many) if claim.kind == NOTHING]
    assert len(denied) == 4 and {claim.about["span"] for claim in denied} == {"last", "image"}


def test_side_effects_grow_with_the_dose(organism, sides):
    parts = parts_of(sides)
    steering = steering_of(organism, parts, layers=[3], spans=("last",), doses=DOSES, n_random=2, n_others=0)
    found = side_effects(organism, [fitting(organism, load_pairs("scenes/kind", n=12))], steering)
    kl = found[(found["what"] == "kl") & (found["direction"] == FOUND)].set_index("dose")["change"]
    assert kl[2.0] > kl[0.5] >= 0 and kl[-2.0] > kl[-0.5]
    assert found["low"].le(found["change"] + 1e-9).all() and found["change"].le(found["high"] + 1e-9).all()
    written, texts = spoken(organism, parts.test, steering, n=2, max_new_tokens=2)
    assert len(texts) == 6 and set(written["what"]) == {"repetition"}


def test_repetition():
    assert repetition("red red red red") == pytest.approx(2 / 3)
    assert repetition("the red car is red") == 0 == repetition("red red") == repetition("")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"contrast": "left/up"}, "contrast 'left/up' is none of scenes/left-right"),
        ({"contrast": "left/left"}, "contrast 'left/left' is none of"),
        ({"doses": (0.5, 1.0)}, "0 and both signs are needed"),
        ({"shares": (0.8, 0.3)}, "two above 0 are needed"),
        ({"spans": ()}, "no span or no layer is named"),
        ({"layers": [9]}, "layer"),
        ({"point": "resid"}, "site 'llm.resid' is not known"),
        ({"spans": ["last", "last"]}, "the span 'last' is given twice"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(organism, sides, given, told):
    with pytest.raises(UsageError, match=re.escape(told)) as error:
        find_direction(organism, sides, **given)
    assert "\n" not in str(error.value)


def test_more_that_cannot_be(organism, sides, direction, tmp_path):
    train = [pair for pair in sides if pair.id in direction.parts["train"]]
    with pytest.raises(UsageError, match="is among those the direction was found or chosen on"):
        dose_response(organism, direction, Pairs("train", tuple(train)))
    with pytest.raises(UsageError, match="there is no file"):
        Direction.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no direction")
    with pytest.raises(UsageError, match="is not a file of a direction"):
        Direction.load(tmp_path / "text")
    with pytest.raises(UsageError, match="cannot be written"):
        direction.save(tmp_path / "none" / "it")
    with pytest.raises(UsageError, match="has norm 0"):
        direction.with_vector(torch.zeros(3))
    image = sides[0].image
    item = Pair("a", image, image, "what?", "left", "right", made="none")
    test = Pairs("test", tuple(pair for pair in sides if pair.id in direction.parts["test"]))
    with pytest.raises(UsageError, match=r"was found in another model \(organism\): weights \w+, not \w+$"):
        dose_response(VLM.load("organism-grounded", check=False), direction, test)
    for vector, told in ((torch.ones(3), "the direction has 3 numbers; llm.resid_post"), (torch.ones(128), "")):
        other = dataclasses.replace(direction, vector=vector, provenance={})
        if told:
            with pytest.raises(UsageError, match=told):
                dose_response(organism, other, test)
        else:
            other.check(organism)
    few = dose_response(organism, direction, test, doses=SMALL, n_random=3, n_orthogonal=0)
    assert any(
        "Only 3 random directions were run; below 20 no claim is made and no p is given" in each
        for each in few.findings
    )
    assert not any("p =" in each for each in few.findings)
    with pytest.raises(UsageError, match="has single items"):
        contrast_of(Pairs("items", (item,)))
