"""What steering could say: a direction shifts the answer, by more than every other one as long; or nothing does."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.data.pairs import Pairs
from vlm_mech.methods.gates.manifold import ClaimEdit, EditOf
from vlm_mech.methods.steering.data import AGAINST, TOWARD
from vlm_mech.methods.steering.states import FOUND, RANDOM, Differences, Place, differences
from vlm_mech.methods.steering.study import ENOUGH_RANDOM, Steering, steered
from vlm_mech.results.claim import Claim, Condition
from vlm_mech.results.claiming import enough_of
from vlm_mech.results.gates import Pool
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

RAISES, LOWERS, NOTHING = "raises", "lowers", "does not change"
"""Kinds of claims: a dose raises the difference of answers, one the other way lowers it, or neither moves it."""
WAYS = ((AGAINST, RAISES, 1), (TOWARD, LOWERS, -1))
"""Each way is asked about the pictures whose answers it leads away from."""
ENOUGH_GROUPS = 128
"""Groups of test pairs from which it is asked where nothing moves: the test says too little of fewer (see
docs/claims.md)."""
N_RANDOM = 5
"""Random directions that a null and another wording have: with fewer than the run has they are beaten more easily."""
WORDS = {"last": "the last token", "image": "the image tokens", "question": "the question tokens"}
SHOWS = {AGAINST: "images that show the other answer", TOWARD: "images that show its answer"}


def pool_of(steering: Steering, n_layers: int) -> Pool:
    """What can be said of a result: nothing with fewer than `ENOUGH_RANDOM` random directions.

    Args:
        n_layers: of the decoder.
    """
    if sum(name.startswith(RANDOM) for name in steering.controls) < ENOUGH_RANDOM:
        return lambda result: ()
    return partial(pool, place=steering.place, dose=steering.dose, last=n_layers - 1)


def pool(result: Result, *, place: Place, dose: float, last: int | None = None) -> tuple[Claim, ...]:
    """Both ways at the place chosen, each away from what pictures show; of many pairs, every place where nothing moves.

    That a direction raises (the other way: lowers) the difference of the answers needs a change of `claiming.enough_of`
    at least, and one larger by as much than that of every control in the run. That neither sign moves it needs both
    changes to lie closer to 0 than that; it is asked from `ENOUGH_GROUPS` groups on.

    Args:
        place: where all controls are.
        dose: that was chosen.
        last: the number of the last layer, after which nobody looks at other tokens than the last.
    """
    metric, found = result.metrics[0], []
    first = result.table.drop_duplicates(["example", "picture"])
    enough = enough_of(float(first.groupby("picture")[f"{metric.name}_baseline"].mean().abs().mean()))
    cells = result.cells
    here = {"span": place.span, "layer": place.layer}
    names = [each for each in cells["direction"].drop_duplicates() if each != FOUND]
    for picture, kind, sign in WAYS:
        cell = {"direction": FOUND, "picture": picture, **here, "dose": sign * dose}
        side: Any = "above" if sign > 0 else "below"
        conditions = [Condition(metric.name, cell, side, enough, less="baseline")]
        less = (cell | {"direction": name} for name in names)
        conditions += [Condition(metric.name, cell, side, enough, less=each) for each in less]
        about = {**here, "picture": picture, "dose": sign * dose}
        says = f"steering {_words(place.span)} at layer {place.layer} by {sign * dose:+g} state norms {kind}"
        says += f" {metric.name} for {SHOWS[picture]}"
        found.append(Claim(kind, about, says, tuple(conditions), metric.unit))
    if len(set(result.table["group"])) >= ENOUGH_GROUPS:
        found += _nothing(result, cells, dose, enough, last)
    return tuple(found)


def _nothing(result: Result, cells: pd.DataFrame, dose: float, enough: float, last: int | None) -> list[Claim]:
    metric, found = result.metrics[0], []
    places = cells.loc[cells["direction"] == FOUND, ["span", "layer"]].drop_duplicates().to_dict("records")
    for here in places:
        # After the last block no token is looked at but the last.
        if here["layer"] == last and "last" not in here["span"].split("+"):
            continue
        for picture in (AGAINST, TOWARD):
            conditions = []
            for sign in (1, -1):
                cell = {"direction": FOUND, "picture": picture, **here, "dose": sign * dose}
                way: dict[str, Any] = {"less": "baseline"}
                conditions.append(Condition(metric.name, cell, "below", 0.0, enough, **way))
                conditions.append(Condition(metric.name, cell, "above", 0.0, -enough, **way))
            says = f"steering {_words(here['span'])} at layer {here['layer']} by {dose:g} state norms, either sign,"
            says += f" {NOTHING} {metric.name} by {enough:.2g} for {SHOWS[picture]}"
            about = {**here, "picture": picture}
            found.append(Claim(NOTHING, about, says, tuple(conditions), metric.unit))
    return found


def _words(span: str) -> str:
    return WORDS.get(span, f"the tokens of {span}")


def edit_of(steering: Steering) -> EditOf:
    """The edit of a claim; pictures against the direction are those of the pairs turned."""

    def made(claim: Claim, pairs: Pairs) -> ClaimEdit | str:
        if claim.kind == NOTHING:
            return "it is about the absence of an effect, of two edits"
        point = next(
            each for each in steering.alone().points() if each.direction == FOUND and each.dose == claim.about["dose"]
        )
        return ClaimEdit(steering.intervention(point), turned=claim.about["picture"] == AGAINST)

    return made


def again(
    vlm: "VLM", train: Pairs, test: Pairs, steering: Steering, how: dict[str, Any], *, batch: int = 32, seed: int = 0
) -> "Callable[[VLM, Pairs], pd.DataFrame]":
    """Does the analysis again at the place and dose chosen, with random directions as controls.

    Of another model the direction is found anew, in its own states. Where pairs have the answers of others, it is that
    of shuffled labels of the training pairs, which is steered along on the pairs as they are: what a direction does to
    two answers depends on no label of what it is tried on. In other words the direction stays what it was: one that
    moves answers to its own wording alone is none of the answer.

    Args:
        train: pairs that the direction was found on.
        test: pairs that the result is about.
        how: further options of `study.steered`.
        batch: prompts per forward pass.
        seed: draws directions.
    """
    own, drawn = {pair.id: pair for pair in test}, iter(range(seed + 1, seed + 10_000))

    def measured(other: "VLM", pairs: Pairs) -> pd.DataFrame:
        alone = steering.alone([name for name in steering.controls if name.startswith(RANDOM)][:N_RANDOM])
        if other is not vlm:
            (found,) = differences(other, train, [steering.place], batch=batch).values()
            alone = _anew(alone, found, next(drawn))
        elif all(pair.wording == own[pair.id].wording and pair is not own[pair.id] for pair in pairs):
            at, mixed = next(drawn), steering.chosen
            (vector,) = mixed.shuffled(1, seed=at)
            alone = _anew(alone, Differences(mixed.place, vector[None], mixed.norm), at)
            pairs = dataclasses.replace(pairs, pairs=tuple(own[pair.id] for pair in pairs))
        return steered(other, pairs, alone, alone.points(), check=0, **how)[0]

    return measured


def _anew(alone: Steering, found: Differences, seed: int) -> Steering:
    n_random = len(alone.controls)
    return Steering({alone.place: found}, alone.place, alone.dose, alone.doses, found.controls(n_random, 0, seed=seed))
