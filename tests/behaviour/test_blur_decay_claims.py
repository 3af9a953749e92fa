"""Claims of a decay's swaps: where they turn the answer at each level, and the sentences that are read off them."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from vlm_mech.behaviour.blur_decay import claims, study
from vlm_mech.behaviour.blur_decay.blur import Scale
from vlm_mech.behaviour.blur_decay.claims import pool, swaps_of, with_claims
from vlm_mech.behaviour.blur_decay.data import KeptImages, with_images
from vlm_mech.behaviour.blur_decay.findings import reading
from vlm_mech.data.pairs import load_pairs
from vlm_mech.inputs.image import load_image
from vlm_mech.methods.gates.gated import Options
from vlm_mech.methods.layer_swap.claims import NO_LONGER, NOT_YET, TURNS, does_of
from vlm_mech.methods.layer_swap.study import LOGIT_DIFF, RECOVERED
from vlm_mech.results.claim import named_without_claim
from vlm_mech.results.claiming import claimed, halves
from vlm_mech.results.gates import SHUFFLED, STABLE, TWIN
from vlm_mech.results.result import Result
from vlm_mech.results.rewording import WORDINGS

OPTIONS = Options("none", 0, 0, 8)
CURVES = {
    ("1", "image"): (0.9, 0.9, 0.1, 0.1), ("1", "last"): (0.0, 0.1, 0.9, 1.0),
    ("61", "image"): (0.9, 0.1, 0.1, 0.1), ("61", "last"): (0.0, 0.5, 0.5, 1.0),
}  # fmt: skip


def made(curves=None, n=24, *, noise=0.05, seed=0):
    """A decay with swaps whose recovered fractions have these means by layer; two answers about the pictures beside."""
    rng, tables = np.random.default_rng(seed), []
    names = [f"e{number}" for number in range(n)]
    for (level, span), curve in (curves or CURVES).items():
        for layer, mean in enumerate(curve):
            recovered = mean + noise * rng.normal(size=n)
            rows = {"example": names, "view": study.SWAPS[span], "level": level, "layer": layer, "skipped": ""}
            rows |= {"recovered": recovered, "recovered_baseline": 0.0}
            tables.append(pd.DataFrame(rows | {"logit_diff": 5 - 10 * recovered, "logit_diff_baseline": 5.0}))
    for level in ("1", "61"):
        rows = {"example": names, "view": study.OWN, "level": level, "layer": study.WHOLE, "skipped": ""}
        tables.append(pd.DataFrame(rows | {"unchanged": 1.0, "unchanged_baseline": 1.0}))
    metrics = (study.UNCHANGED, RECOVERED, LOGIT_DIFF)
    return Result("visual decay", pd.concat(tables, ignore_index=True), study.AXES, metrics)


def swaps(result):
    found = swaps_of(result)
    assert found is not None
    return found


def half_that_tests(result):
    parts = halves(result)
    assert parts is not None
    return parts[1].table


def told(result, level, span, does):
    """The layers of the claims of a kind that are made."""
    about = {"level": level, "span": span}
    some = [claim for claim in result.claims if claim.made and about.items() <= claim.about.items()]
    return [claim.about["layer"] for claim in some if does_of(claim) == does]


def with_told(result):
    own = swaps(result)
    return dataclasses.replace(result, claims=claimed(pool(own, layers=range(3)), own))


def test_every_level_is_asked_what_a_layer_swap_is():
    found = with_told(made())
    assert told(found, "1", "image", TURNS) == [0, 1] and told(found, "61", "image", TURNS) == [0]
    assert told(found, "1", "image", NO_LONGER) == [2] and told(found, "61", "image", NO_LONGER) == [1, 2]
    assert told(found, "1", "last", NOT_YET) == [0, 1] and told(found, "1", "last", TURNS) == [2]
    assert told(found, "61", "last", NOT_YET) == [0] and told(found, "61", "last", TURNS) == [], "a half is neither"
    kinds = {claim.kind for claim in pool(swaps(made()))}
    assert len(kinds) == 8, "nulls of a level are held against claims of that level"


def test_numbers_are_those_of_the_other_half_of_the_swaps_alone():
    own = swaps(made())
    assert set(own.table["view"]) == set(study.SWAPS.values()) and own.metrics == (RECOVERED, LOGIT_DIFF)
    other = half_that_tests(own)
    found = claimed(pool(own, layers=range(3)), own)
    turns = next(
        claim for claim in found if claim.says == "at kernel 1, patching the image tokens at layer 1 flips the answer"
    )
    rows = other[(other["view"] == "swap of image") & (other["level"] == "1") & (other["layer"] == 1)]
    assert turns.tested[0].mean == pytest.approx(rows["recovered"].mean()) and turns.tested[0].n == 12
    assert turns.tested[1].mean == pytest.approx((rows["logit_diff"] - 5).mean())
    ends = next(claim for claim in found if claim.about == {"level": "61", "span": "image", "layer": 2})
    assert ends.conditions[1].less == {"view": "swap of image", "level": "61", "layer": 0}
    first = other[(other["view"] == "swap of image") & (other["level"] == "61") & (other["layer"] == 0)]
    last = other[(other["view"] == "swap of image") & (other["level"] == "61") & (other["layer"] == 2)]
    assert ends.tested[1].mean == pytest.approx(last["logit_diff"].mean() - first["logit_diff"].mean())


def test_nothing_is_claimed_of_swaps_that_do_as_they_please():
    n_false = 0
    for seed in range(40):
        result = made(dict.fromkeys(CURVES, (0.5,) * 4), noise=1.0, seed=seed)
        n_false += any(claim.made for claim in with_told(result).claims)
    assert n_false <= 2


def test_sentences_name_layers_in_claims_alone():
    result = with_told(made())
    said = reading(result)
    assert said[0].startswith("Claims: ") and len(said) == 3
    assert said[1].startswith(
        "At kernel 1 (n = 24): patching the image tokens flips the answer up to layer 1 (recovered "
    )
    assert "it no longer flips the answer at layer 2 (" in said[1]
    assert "patching the last token alone does not yet flip the answer up to layer 1 (" in said[1]
    assert "patching the last token alone does not yet flip the answer at layer 0 (" in said[2]
    assert named_without_claim(said, result.claims) == []
    assert len(named_without_claim(said, ())) == 3 - 1, "but for the first, all name layers"
    silent = reading(dataclasses.replace(result, claims=()))
    nothing = "no claim is made about patching the image tokens or the last token alone."
    assert all(each.endswith(nothing) for each in silent[1:])
    behaviour = result.table[result.table["view"] == study.OWN].reset_index(drop=True)
    assert reading(dataclasses.replace(result, table=behaviour, known={})) == ()


def test_pictures_are_kept_by_level_as_long_as_there_is_room(monkeypatch):
    pairs = load_pairs("scenes/colour", n=3)
    kept, blurs = KeptImages(Scale(64)), []
    monkeypatch.setattr(
        "vlm_mech.behaviour.blur_decay.data.with_images",
        lambda some, level, scale: blurs.append((some[0].id, level)) or with_images(some, level, scale),
    )
    others = dataclasses.replace(pairs, pairs=tuple(dataclasses.replace(each, answer="grey") for each in pairs))
    for some in (pairs, others, pairs):
        for level in ("1", "5"):
            for one, other in zip(kept(some, level), with_images(some, level, Scale(64)), strict=True):
                assert one.answer == other.answer
                for pictures in ("images", "counterfactual_images"):
                    both = [np.asarray(load_image(getattr(each, pictures)[0])) for each in (one, other)]
                    assert np.array_equal(*both)
    assert sorted(blurs) == sorted((pair.id, level) for pair in pairs for level in ("1", "5"))
    small = KeptImages(Scale(64), room=2 * 3 * 64 * 64)
    small(pairs, "1")
    assert len(small.kept) == 1 and small.room == 0


def test_swaps_meet_nulls_at_every_level(vlm, monkeypatch):
    """A null that does more than the model does reaches every claim that the answer turns."""
    pairs, asked = load_pairs("scenes/colour", n=24), []
    result = made({key: (*curve, 0.0)[:4] for key, curve in CURVES.items()})

    def measured(vlm, some, levels, shown, *, memory):
        asked.append((vlm, tuple(levels), len(some)))
        table = swaps(result).table
        return table.assign(recovered=table["recovered"] + 0.2, logit_diff=table["logit_diff"] - 2)

    monkeypatch.setattr(claims, "swapped_at", measured)
    found = with_claims(result, Options("all", 1, 0, 32), vlm, pairs, ("1", "61"), Scale(64))
    made_ = [claim for claim in found.claims if claim.made]
    assert made_ and all([gate.name for gate in claim.gates] == [STABLE, TWIN, SHUFFLED, WORDINGS] for claim in made_)
    assert [levels for _, levels, _ in asked] == [("1", "61")] * 2
    assert all(set(claim.lost) >= {TWIN, SHUFFLED} for claim in made_ if does_of(claim) == TURNS)
    plain = with_claims(result, OPTIONS, vlm, pairs, ("1", "61"), Scale(64))
    assert all(not claim.gates for claim in plain.claims) and len(asked) == 2
