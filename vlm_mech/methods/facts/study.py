"""Where each method says that the answer is read: a layer with its interval over pairs, the claims that name it, and
which layers all name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from vlm_mech.methods.attribution.claims import LOWERS
from vlm_mech.methods.facts.data import (
    ATTRIBUTION,
    EXPECTED,
    HEADS,
    KNOCKOUT,
    LAST,
    LATE,
    LENS,
    PATHS,
    SUBJECT,
    SWAP,
    TUNED,
    WINDOW,
)
from vlm_mech.methods.facts.parts import READ, TELLS
from vlm_mech.methods.knockout.claims import NEEDED
from vlm_mech.methods.layer_swap.claims import NO_LONGER, TURNS, kind_of
from vlm_mech.methods.lens.claims import RISE
from vlm_mech.results.claim import Claim
from vlm_mech.results.claimed_layers import runs
from vlm_mech.results.result import Metric, Result

AXES = ("part", "line", "head", "layer")
CHANGE = Metric(
    "change", "logits", "change of the answer's lead over the other subject's answer", signed=True, against="no change"
)
ELSEWHERE = "not run on this pair"
N_RESAMPLES = 2000
"""Resamples of the pairs' groups, in each of which the layer is found anew."""
AGREEING = (KNOCKOUT, SWAP, HEADS, ATTRIBUTION)
"""The methods of which it is told whether they agree: those that change the run where it reads."""


@dataclass(frozen=True)
class Rule:
    """How a method's rows say where the answer is read: the layer with the extreme mean of a line.

    `step` takes the change from the layer before in place of the value; `sign` is 1 where the largest counts, -1 where
    the smallest does. `kind` and `about` are those of the claims that name such a layer.
    """

    part: str
    line: str
    what: str
    sign: int
    kind: str
    about: Mapping[str, Any]
    step: bool = False
    spread: int = 0
    """Layers on either side that an edit reaches beyond its own."""


RULES = (
    Rule(KNOCKOUT, READ, f"cut in {WINDOW} layers: largest loss near", -1, NEEDED, {"edge": READ}, spread=WINDOW // 2),
    Rule(SWAP, SUBJECT, "the subject's state: effect ends at", 1, kind_of(SUBJECT, NO_LONGER), {}, step=True),
    Rule(SWAP, LAST, "the last token's state: effect begins at", -1, kind_of(LAST, TURNS), {}, step=True),
    Rule(HEADS, "all heads", "cut in one layer, then head by head: largest loss at", -1, NEEDED, {}),
    Rule(ATTRIBUTION, "estimate", "patching of heads' outputs: largest loss at", -1, LOWERS, {}),
    Rule(LENS, "step", "logit lens: largest rise of the lead across", 1, RISE, {}),
    Rule(TUNED, "step", "tuned lens: largest rise of the lead across", 1, RISE, {}),
    Rule(PATHS, "path", "direct path to the output: largest loss from", -1, TELLS, {}),
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """A layer that a method names, with 95 % of the layers that resamples of the pairs name, and what is claimed.

    `layer`, `low` and `high` are None where the method claims nothing of the kind. `claimed` are the layers of claims.
    """

    rule: Rule
    layer: int | None
    low: int | None
    high: int | None
    share: float
    n: int
    claimed: tuple[int, ...]
    heads: tuple[str, ...]
    late: bool | None

    @property
    def reach(self) -> frozenset[int]:
        """The layers in which it says that the answer may be read; none where it says nothing."""
        if self.layer is None or self.low is None or self.high is None:
            return frozenset()
        return frozenset(range(self.low - self.rule.spread, self.high + self.rule.spread + 1))


def result_of(rows: pd.DataFrame, provenance: dict[str, Any], claims: tuple[Claim, ...] = ()) -> Result:
    """The rows of all parts as one result; a pair has a row, perhaps without a value, in every cell."""
    numbers = {"layer": int, "head": int, CHANGE.name: float, f"{CHANGE.name}_baseline": float}
    rows = rows.astype(numbers).drop_duplicates(["example", *AXES])
    cells, people = rows[[*AXES]].drop_duplicates(), rows[["example", "group"]].drop_duplicates("example")
    whole = people.merge(cells, how="cross").merge(rows.drop(columns="group"), on=["example", *AXES], how="left")
    whole["skipped"] = np.where(whole[CHANGE.name].isna(), ELSEWHERE, "")
    return Result("facts", whole, AXES, (CHANGE,), {}, provenance, elsewhere=ELSEWHERE, claims=claims)


def readings(result: Result, claims: Mapping[str, Sequence[Claim]], *, n_layers: int, seed: int = 0) -> list[Reading]:
    """What each method says, in the order of the page.

    Args:
        claims: by part.
        n_layers: of the decoder.
        seed: draws resamples.
    """
    found = []
    for rule in RULES:
        rows = result.table[(result.table["part"] == rule.part) & (result.table["line"] == rule.line)]
        rows = rows[rows["skipped"] == ""]
        if not rows.empty:
            found.append(_reading(rows, rule, claims.get(rule.part, ()), n_layers, seed))
    return found


def _reading(rows: pd.DataFrame, rule: Rule, claims: Sequence[Claim], n_layers: int, seed: int) -> Reading:
    made = [
        claim
        for claim in claims
        if claim.made and claim.kind == rule.kind and dict(rule.about).items() <= claim.about.items()
    ]
    layers = tuple(sorted({int(claim.about["layer"]) for claim in made}))
    heads = [f"L{claim.about['layer']}H{claim.about['head']}" for claim in _strongest(made) if "head" in claim.about]
    values, places, groups = by_layer(rows)
    n = len(np.unique(groups))
    if not layers:
        return Reading(rule, None, None, None, float("nan"), n, (), (), None)
    layer, low, high, share = extreme(values, places, groups, sign=rule.sign, step=rule.step, seed=seed)
    return Reading(rule, layer, low, high, share, n, layers, tuple(heads), layer >= LATE * n_layers)


def _strongest(claims: Sequence[Claim]) -> list[Claim]:
    return sorted(claims, key=lambda claim: -claim.strength(claim.declared))


def by_layer(
    rows: pd.DataFrame,
) -> tuple[Float[np.ndarray, "example layer"], Int[np.ndarray, "layer"], Int[np.ndarray, "example"]]:
    """Values by example and layer, heads of a layer added up; the layers; and the group of each example."""
    table = rows.pivot_table(index="example", columns="layer", values=CHANGE.name, aggfunc="sum", sort=True)
    groups = rows.drop_duplicates("example").set_index("example").loc[table.index, "group"]
    return table.to_numpy(float), table.columns.to_numpy(int), pd.factorize(groups)[0]


def extreme(
    values: Float[np.ndarray, "example layer"],
    layers: Int[np.ndarray, "layer"],
    groups: Int[np.ndarray, "example"],
    *,
    sign: int,
    step: bool = False,
    seed: int = 0,
) -> tuple[int, int, int, float]:
    """The layer with the extreme mean, the range that holds 95 % of those of resamples, and the share that name it.

    Args:
        sign: 1 for the largest mean, -1 for the smallest.
        step: take the change from the layer before.
        seed: draws resamples of groups.
    """
    if step:
        values, layers = np.diff(values, axis=1), layers[1:]
    distinct = np.unique(groups)
    members = np.stack([values[groups == each].sum(0) for each in distinct])
    sizes = np.array([(groups == each).sum() for each in distinct])
    own = int(layers[(sign * members.sum(0)).argmax()])
    drawn = np.random.default_rng(seed).integers(0, len(distinct), (N_RESAMPLES, len(distinct)))
    means = members[drawn].sum(1) / sizes[drawn].sum(1)[:, None]
    found = np.sort(layers[(sign * means).argmax(1)])
    low, high = (int(found[round(share * (N_RESAMPLES - 1))]) for share in (0.025, 0.975))
    return own, min(low, own), max(high, own), float((found == own).mean())


def agreed(found: Sequence[Reading]) -> tuple[int, ...]:
    """The layers in which all methods of `AGREEING` that were asked say that the answer may be read.

    None where one of them claims nothing, or fewer than two were asked.
    """
    asked = [each for each in found if each.rule.part in AGREEING]
    if len({each.rule.part for each in asked}) < 2:
        return ()
    return tuple(sorted(frozenset.intersection(*(each.reach for each in asked))))


def as_table(found: Sequence[Reading]) -> pd.DataFrame:
    """A row a method: what it looks at, the layer with its interval, the layers of claims, and what was expected."""
    rows = []
    for each in found:
        spans = runs(each.claimed, range(max(each.claimed) + 1)) if each.claimed else []
        told = ", ".join(str(start) if start == end else f"{start} to {end}" for start, end in spans)
        rows.append(
            {
                "method": each.rule.part,
                "what": each.rule.what,
                "layer": each.layer,
                "low": each.low,
                "high": each.high,
                "share of resamples": each.share,
                "n": each.n,
                "claimed layers": told or "none",
                "claimed heads": " ".join(each.heads) or "none",
                "upper half": {True: "yes", False: "no", None: "nothing claimed"}[each.late],
                "literature": EXPECTED[each.rule.part],
            }
        )
    return pd.DataFrame(rows).astype({"layer": "Int64", "low": "Int64", "high": "Int64"})
