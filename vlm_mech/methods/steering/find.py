"""A direction found in one call: on some pairs, its place and dose chosen on others, told of the rest."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from vlm_mech.data.fitting import Variety, fitting
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import listed
from vlm_mech.interventions.receipt import add_up
from vlm_mech.methods.steering.data import (
    AGAINST,
    AUTO,
    DOSES,
    SHARES,
    Contrast,
    check_doses,
    contrast_of,
    oriented,
    three_parts,
)
from vlm_mech.methods.steering.direction import Direction
from vlm_mech.methods.steering.findings import findings
from vlm_mech.methods.steering.side_effects import COLUMNS
from vlm_mech.methods.steering.states import FOUND, Differences, Place, differences, places_of
from vlm_mech.methods.steering.study import (
    RIGHT,
    SAYS,
    Steering,
    choice_points,
    choosing,
    chosen,
    result_of,
    slopes,
    steered,
)
from vlm_mech.results.result import Result
from vlm_mech.runs.provenance import about
from vlm_mech.sweeps.asked import check_call, check_once, check_whole
from vlm_mech.sweeps.measures import Comparison

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

SPANS = ("last", "image")
QUESTION = (
    "Does a steering direction change the answers, by how much per dose, and what else does it change? The direction "
    "is the difference of mean states between two kinds of images, computed on training pairs. Span, layer and dose "
    "are chosen on validation pairs. Test answers are given by dose, compared with random directions of equal norm."
)


@dataclass(frozen=True, eq=False)
class Parts:
    """The pairs of a contrast in three parts, each turned so that its first picture is the one the direction is for."""

    contrast: Contrast
    train: Pairs
    validation: Pairs
    test: Pairs

    @property
    def every(self) -> Pairs:
        """All of them."""
        return dataclasses.replace(self.test, pairs=(*self.train, *self.validation, *self.test))

    @property
    def counts(self) -> dict[str, int]:
        """Pairs by part."""
        return {name: len(getattr(self, name)) for name in ("train", "validation", "test")}


def parts_of(pairs: Pairs, contrast: str = AUTO, shares: Sequence[float] = SHARES, *, seed: int = 0) -> Parts:
    """The pairs that have a contrast in three parts.

    Args:
        contrast: see `data.contrast_of`.
        shares: of the groups, for the first two parts.
        seed: draws the groups.

    Raises:
        UsageError: single items, an answer that no pair has, or too few groups.
    """
    found = contrast_of(pairs, contrast)
    return Parts(found, *three_parts(oriented(pairs, found), shares, seed=seed))


def steering_of(
    vlm: "VLM",
    parts: Parts,
    *,
    spans: Sequence[str] = SPANS,
    layers: Sequence[int] | None = None,
    point: str = "resid_post",
    doses: Sequence[float] = DOSES,
    n_random: int = 20,
    n_others: int = 5,
    measure: Comparison = "logit_diff",
    batch: int = 32,
    engine: str = "fast",
    memory: int | str | None = None,
    seed: int = 0,
) -> Steering:
    """Directions at all places, with the place and dose that the validation pairs choose, and the controls there.

    Args:
        spans, layers, point: the places.
        doses: among those above 0 one is chosen.
        n_random: random directions of equal norm; below 20 no claim is made.
        n_others: of shuffled labels, and as many orthogonal to the one found.
        measure, engine, memory: as for `study.steered`.
        batch: pairs per forward pass.
        seed: draws the controls.

    Raises:
        UsageError: a place or a dose that cannot be.
    """
    every = check_doses(doses)
    check_once(list(spans), "the span")
    check_whole(n_random=(n_random, 1), n_others=(n_others, 0))
    found = differences(vlm, parts.train, places_of(vlm, spans, layers, point), batch=batch)
    asked = choosing(found, every)
    how: dict[str, Any] = {"pictures": (AGAINST,), "measure": measure, "engine": engine, "memory": memory}
    starts, points = range(0, len(parts.validation), batch), choice_points(asked)
    tables = [steered(vlm, parts.validation[at : at + batch], asked, points, **how)[0] for at in starts]
    place, dose = chosen(pd.concat(tables, ignore_index=True), measure, found)
    return Steering(found, place, dose, every, found[place].controls(n_random, n_others, seed=seed))


def direction_of(vlm: "VLM", steering: Steering, parts: Parts, result: Result) -> Direction:
    """The direction at the place chosen, with where it comes from and what it did to the test pairs.

    Args:
        result: of the test pairs.
    """
    here, metric = steering.chosen, result.metrics[0].name
    ids = {name: tuple(pair.id for pair in getattr(parts, name)) for name in parts.counts}
    summary = result.summary()
    rows = summary[(summary["direction"] == FOUND) & (summary["dose"] == steering.dose)]
    rows = rows[(rows["span"] == here.place.span) & (rows["layer"] == here.place.layer)]
    columns = ["picture", "metric", "n", "baseline", "mean", "effect", "effect_low", "effect_high"]
    told = rows[rows["metric"].isin([metric, SAYS.name, RIGHT.name])][columns]
    origin = {"model": vlm.identity(), "data": parts.test.described, "measure": metric}
    return Direction(
        vector=here.vector.clone(),
        site=here.place.site,
        span=here.place.span,
        norm=here.norm,
        dose=steering.dose,
        n=len(parts.train),
        contrast=parts.contrast.asked,
        parts=ids,
        told={"test": told.to_dict("records")},
        provenance=origin,
    )


def told_of(steering: Steering, contrast: Contrast, counts: dict[str, int]) -> dict[str, Any]:
    """What the provenance of a result says of the direction."""
    place = steering.place
    told = {"contrast": str(contrast), "asked": contrast.asked, "span": place.span, "layer": place.layer}
    told |= {"point": place.point, "dose": steering.dose, "n_pairs": counts, "state_norm": steering.chosen.norm}
    return told | {"share_of_norm": float(steering.chosen.vector.norm()) / steering.chosen.norm}


def find_direction(
    vlm: "VLM",
    pairs: Pairs,
    *,
    contrast: str = AUTO,
    spans: str | Sequence[str] = SPANS,
    layers: Sequence[int] | None = None,
    point: str = "resid_post",
    doses: Sequence[float] = DOSES,
    shares: Sequence[float] = SHARES,
    measure: Comparison = "logit_diff",
    variants: Variety = "likeliest",
    batch: int = 32,
    engine: str = "fast",
    memory: int | str | None = None,
    seed: int = 0,
) -> Direction:
    """The difference of mean states between pictures with one answer and pictures with another, where it steers best.

    Groups of pairs are parted in three. On the first part the direction is found at every layer and span: the mean over
    pairs of the state (its mean over the span's tokens) of the picture that the direction is for, minus that of the
    other picture. On the second, layer, span and dose are chosen: those with which greedy decoding gives the
    direction's answer most often about pictures that show another one (of equal ones the smallest dose). What that
    does to the third, which chose nothing, is in `told`.

    Args:
        contrast: "shown" for what pictures in conflict show, over the usual answer; "left/right" for one answer over
            another; "red" for one over all others. "auto" is the first where pairs say which picture is in conflict,
            the second of pairs with two answers in all, and else the commonest answer.
        spans: tokens whose states are moved, each by the same vector; several joined by + are moved together.
        layers: blocks after which they are moved, by default all but the last, where only the head is left.
        point: the tensor of each block, such as `resid_post`.
        doses: in shares of the mean norm of states there, among which one above 0 is chosen; 0 and both signs.
        shares: of the groups, for finding and for choosing.
        measure: how the two answers of a pair are compared: `logit_diff`, `logprob_diff` or `logprob_diff_per_token`.
        variants: spellings of the answers, as for `layer_swap`.
        batch: pairs per forward pass.
        engine: `fast`, or `trace` for the reference.
        memory: bytes it may take beyond the model, such as "2GiB".
        seed: parts the groups.

    Raises:
        UsageError: single items, an answer that no pair has, too few groups, or a place or dose that cannot be.
    """
    check_call(vlm, pairs, "find_direction", batch=(batch, 1))
    fitted = fitting(vlm, pairs, variants=variants, whole=measure != "logit_diff")
    parts = parts_of(fitted, contrast, shares, seed=seed)
    how: dict[str, Any] = {"measure": measure, "engine": engine, "memory": memory}
    where: dict[str, Any] = {"spans": listed(spans), "layers": layers, "point": point, "doses": doses}
    steering = steering_of(vlm, parts, **where, n_random=1, n_others=0, batch=batch, seed=seed, **how)
    alone = steering.alone()
    result = _measured(vlm, parts.test, alone, parts.contrast, parts.counts, batch, measure, how)
    return direction_of(vlm, alone, parts, result)


def dose_response(
    vlm: "VLM",
    direction: Direction,
    pairs: Pairs,
    *,
    doses: Sequence[float] = DOSES,
    n_random: int = 20,
    n_orthogonal: int = 5,
    measure: Comparison = "logit_diff",
    variants: Variety = "likeliest",
    batch: int = 32,
    engine: str = "fast",
    memory: int | str | None = None,
    seed: int = 0,
) -> Result:
    """How answers follow the dose of a direction, beside random directions of equal norm.

    Args:
        direction: such as `find_direction` gives; its contrast says which pairs are asked, and which answer is its own.
        pairs: none of those that it was found or chosen on.
        doses: in shares of the mean norm of states there; 0 and both signs.
        n_random: random directions of equal norm; all of the sphere. Below 20 no p is told, and the findings say so.
        n_orthogonal: random directions of equal norm without what they have of the direction.
        measure: how the two answers of a pair are compared.
        variants: spellings of the answers.
        batch: pairs per forward pass.
        engine: `fast`, or `trace` for the reference.
        memory: bytes it may take beyond the model, such as "2GiB".
        seed: draws the random directions.

    Returns:
        A row a pair, picture (`toward`: it shows the direction's answer, or `against`), direction and dose; metrics are
        the difference of the answers, `says_toward` and `right`. `findings` has slopes, anti-steerable share and rank.

    Raises:
        UsageError: a direction of another model, pairs that it was found on, none that has its contrast or all in one
            group, or doses that cannot be.
    """
    check_call(vlm, pairs, "dose_response", batch=(batch, 1), n_random=(n_random, 1), n_orthogonal=(n_orthogonal, 0))
    if not isinstance(direction, Direction):
        raise UsageError(f"dose_response takes a Direction, not a {type(direction).__name__}; find_direction gives one")
    direction.check(vlm)
    known = {*direction.parts.get("train", ()), *direction.parts.get("validation", ())}
    if met := [pair.id for pair in pairs if pair.id in known]:
        raise UsageError(f"pair {met[0]!r} is among those the direction was found or chosen on; others must test it")
    fitted = fitting(vlm, pairs, variants=variants, whole=measure != "logit_diff")
    contrast = contrast_of(fitted, direction.contrast or AUTO)
    faced, every = oriented(fitted, contrast), check_doses(doses)
    if (n_groups := len({pair.group or pair.id for pair in faced})) < 2:
        raise UsageError(f"{pairs.name}: {len(faced)} pairs in {n_groups} groups; slopes need two groups at least")
    place = Place(direction.span, int(direction.site.layer or 0), direction.site.name.partition(".")[2])
    found = Differences(place, torch.stack([direction.vector.float().cpu()]), direction.norm)
    controls = found.controls(n_random, n_orthogonal, seed=seed)
    some = {name: each for name, each in controls.items() if not name.startswith("shuffled")}
    steering = Steering({place: found}, place, abs(direction.dose), every, some)
    how: dict[str, Any] = {"measure": measure, "engine": engine, "memory": memory}
    counts = {"train": direction.n, "validation": len(direction.parts.get("validation", ())), "test": len(faced)}
    result = _measured(vlm, faced, steering, contrast, counts, batch, measure, how)
    here = {"span": place.span, "layer": place.layer}
    told = findings(result, slopes(result, here, seed=seed), _NONE, claiming=False)
    return dataclasses.replace(result, findings=told)


_NONE = pd.DataFrame(columns=list(COLUMNS))


def _measured(
    vlm: "VLM",
    pairs: Pairs,
    steering: Steering,
    contrast: Contrast,
    counts: dict[str, int],
    batch: int,
    measure: Comparison,
    how: dict[str, Any],
) -> Result:
    """Every cell of a steering on pairs, as a result."""
    points, starts = steering.points(), range(0, len(pairs), batch)
    done = [steered(vlm, pairs[at : at + batch], steering, points, **how) for at in starts]
    table = pd.concat([rows for rows, _ in done], ignore_index=True)
    told = about(QUESTION, vlm, pairs, add_up([notes for _, notes in done]))
    return result_of(table, measure, told | {"direction": told_of(steering, contrast, counts)})
