"""Where the lens lets the answer shown overtake the prior: the two-layer rule, and what the gap says of the outcome.

After MAC (arXiv 2604.09364) in the reading of a public replication: v and p are the largest logits at the last token
over the first tokens of {w, Title, UPPER, " w", " Title"} of both answers; the crossover is the first block i with
v > p after it and after the next one. Every state goes through the final norm once, the last one too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm_mech.methods.arbitration_page.data import CONFLICT, NO_HEAD, RUNS, USUAL, Cases
from vlm_mech.methods.lens.leads import INPUT
from vlm_mech.results.statistics import estimate, percentile_interval, share_interval
from vlm_mech.sweeps.recorded_pass import record

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

DEPTHS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the depth at which gaps and distances are told."""
N_RESAMPLES = 2000
MARGIN = 1.0
"""Logits by which the lens must prefer the shown answer where the rule is asked more strictly (ours)."""
LENS = "lens"
FEWEST = 4
"""Examples of either outcome without which no correlation is told."""


def forms(word: str) -> tuple[str, ...]:
    """The ways in which a word is written that the rule counts."""
    plain = word.strip()
    each = (plain, plain.title(), plain.upper(), f" {plain}", f" {plain.title()}")
    return tuple(dict.fromkeys(each))


def first_ids(vlm: "VLM", word: str) -> frozenset[int]:
    """First tokens of a word in all its forms, but for those that stand for no word."""
    found, unknown = set(), vlm.tokenizer.unk_token_id
    for form in forms(word):
        ids = vlm.tokenizer(form, add_special_tokens=False)["input_ids"]
        if ids and ids[0] != unknown:
            found.add(int(ids[0]))
    return frozenset(found)


def token_sets(vlm: "VLM", shown: Sequence[str], prior: Sequence[str]) -> list[tuple[list[int], list[int]] | None]:
    """The first tokens of both answers of each example, without those that both have; None where one has none left."""
    known = {word: first_ids(vlm, word) for word in {*shown, *prior}}
    found: list[tuple[list[int], list[int]] | None] = []
    for one, other in zip(shown, prior, strict=True):
        both = known[one] & known[other]
        own, others = sorted(known[one] - both), sorted(known[other] - both)
        found.append((own, others) if own and others else None)
    return found


def leads(
    logits: Float[Tensor, "example vocab"], sets: Sequence[tuple[list[int], list[int]] | None]
) -> Float[np.ndarray, "example"]:
    """The largest logit of the answer shown minus that of the prior; NaN where they cannot be distinguished."""
    found = np.full(len(sets), np.nan)
    for at, each in enumerate(sets):
        if each is not None:
            own, other = (logits[at, torch.tensor(ids, device=logits.device)].max().item() for ids in each)
            found[at] = own - other
    return found


def lens_rows(vlm: "VLM", cases: Cases) -> pd.DataFrame:
    """The lens at the last token of both runs by depth, and the distance between their states there.

    Returns:
        A row an example, run and depth (`INPUT` is what the decoder receives): `lead`, its baseline in the input, and
        in the run in conflict `distance`, the Euclidean one.
    """
    sets = token_sets(vlm, [pair.answer for pair in cases.pairs], [pair.counterfactual_answer for pair in cases.pairs])
    tables, states = [], {}
    for run in RUNS:
        encoded = vlm.encode(cases.prompts(run))
        clean, layers = record(vlm, encoded), (INPUT, *vlm.llm_layers)
        with torch.no_grad():
            states[run] = [clean.hidden(depth)[:, -1] for depth in range(len(layers))]
            found = [leads(vlm.readout(each), sets) for each in states[run]]
        for layer, lead in zip(layers, found, strict=True):
            place = {"run": run, "donor": LENS, "span": "last", "layer": layer, "head": NO_HEAD}
            rows = {"example": [pair.id for pair in cases.pairs], "lead": lead, "lead_baseline": found[0]}
            tables.append(pd.DataFrame(rows | place))
    for table, own, other in zip(tables, states[CONFLICT], states[USUAL], strict=False):
        table["distance"] = (own - other).float().norm(dim=-1).double().cpu().numpy()
        table["distance_baseline"] = 0.0
    return pd.concat(tables, ignore_index=True)


def two_layer_rule(lead: Float[np.ndarray, "example depth"], margin: float = 0.0) -> Float[np.ndarray, "example"]:
    """The first depth i from 1 on with a lead above a margin there and at the next one; NaN where there is none.

    Args:
        lead: in the decoder's input (depth 0) and after each block.
        margin: logits; 0 is the rule of the replication.
    """
    above = lead > margin
    both = above[:, 1:-1] & above[:, 2:]
    return np.where(both.any(1), both.argmax(1) + 1.0, np.nan) if both.shape[1] else np.full(len(lead), np.nan)


def depth_at(share: float, n_layers: int) -> int:
    """The depth (0 is the input, the number of layers the last output) at a share of it; the first block at least."""
    return max(1, round(share * n_layers))


@dataclass(frozen=True, eq=False)
class Leads:
    """Leads of some examples by depth, in both runs, and whether the shown answer is preferred.

    `distance` is that of the last token's states between both pictures.
    """

    conflict: Float[np.ndarray, "example depth"]
    usual: Float[np.ndarray, "example depth"]
    distance: Float[np.ndarray, "example depth"]
    won: Bool[np.ndarray, "example"]
    groups: Int[np.ndarray, "example"]

    @classmethod
    def of(cls, table: pd.DataFrame) -> "Leads":
        """From the rows that `lens_rows` gave, with their groups; an answer that the last state prefers is said."""
        rows = table[table["donor"] == LENS].sort_values("layer", kind="stable")
        order = list(dict.fromkeys(rows["example"]))

        def by_depth(run: str, name: str) -> np.ndarray:
            some = rows[rows["run"] == run]
            return some.pivot(index="example", columns="layer", values=name).loc[order].to_numpy(float)

        conflict = by_depth(CONFLICT, "lead")
        groups = pd.factorize(rows.drop_duplicates("example")["group"])[0]
        distance = by_depth(CONFLICT, "distance")
        return cls(conflict, by_depth(USUAL, "lead"), distance, conflict[:, -1] > 0, groups)

    def crossovers(self) -> pd.DataFrame:
        """A row a run, group of items and margin: share without a crossover (interval), its place, the final gap."""
        rows = []
        for run, lead in (("conflict", self.conflict), ("usual", self.usual)):
            for name, some in (("all", np.ones(len(self.won), bool)), ("won", self.won), ("lost", ~self.won)):
                held = some & ~np.isnan(lead).any(1)
                for margin in (0.0, MARGIN) if held.any() else ():
                    place = {"run": run, "items": name, "margin": margin}
                    rows.append(place | _crossed(lead[held], self.groups[held], margin))
        return pd.DataFrame(rows)

    def predictors(self) -> pd.DataFrame:
        """Spearman's correlation of the outcome (the shown answer is said) with gap and distance, by share of depth."""
        rows, n_layers = [], self.conflict.shape[1] - 1
        for name, values in (("gap", self.conflict), ("distance", self.distance)):
            for share in DEPTHS:
                of = values[:, depth_at(share, n_layers)]
                held = ~np.isnan(of)
                row = {"predictor": name, "depth": share, "n": int(held.sum())}
                rows.append(row | _correlated(of[held], self.won[held], self.groups[held]))
        return pd.DataFrame(rows)


def _crossed(
    lead: Float[np.ndarray, "example depth"], groups: Int[np.ndarray, "example"], margin: float
) -> dict[str, Any]:
    at, n_layers = two_layer_rule(lead, margin), lead.shape[1] - 1
    without = np.isnan(at)
    groups = np.unique(groups, return_inverse=True)[1]
    share = bootstrap_share(without, groups)
    final = lead[:, -1:]
    low = high = np.nan
    if len(np.unique(groups)) > 1:
        (low,), (high,) = percentile_interval(final, groups, level=0.95, n_resamples=N_RESAMPLES, seed=0)
    row = {"n": len(lead), "without": share[0], "without_low": share[1], "without_high": share[2]}
    places = at[~without]
    middle = np.percentile(places, [25, 50, 75]) / n_layers if len(places) else np.full(3, np.nan)
    row |= {"depth_25": middle[0], "depth_median": middle[1], "depth_75": middle[2]}
    return row | {"final_gap": float(final.mean()), "gap_low": float(low), "gap_high": float(high)}


def bootstrap_share(
    hits: Bool[np.ndarray, "example"], groups: Int[np.ndarray, "example"]
) -> tuple[float, float, float]:
    """A share with its 95 % interval over groups; Wilson's where all or none are hits."""
    value, n_groups = float(hits.mean()), len(np.unique(groups))
    if value in (0.0, 1.0) or n_groups < 2:
        return (value, *share_interval(round(value * n_groups), n_groups))
    (low,), (high,) = percentile_interval(
        hits[:, None].astype(float), groups, level=0.95, n_resamples=N_RESAMPLES, seed=0
    )
    return value, float(low), float(high)


def spearman(values: Float[np.ndarray, "example"], won: Bool[np.ndarray, "example"]) -> float:
    """Spearman's correlation with an outcome of two values, whose ranks lie on a line with the outcome itself."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    # Of equal values the mean of their ranks.
    ranks, hits = (np.cumsum(counts) - (counts - 1) / 2)[at], won.astype(float)
    ranks, hits = ranks - ranks.mean(), hits - hits.mean()
    return float(ranks @ hits / np.sqrt((ranks @ ranks) * (hits @ hits)))


def _correlated(
    values: Float[np.ndarray, "example"], won: Bool[np.ndarray, "example"], groups: Int[np.ndarray, "example"]
) -> dict[str, Any]:
    missing = {"rho": np.nan, "rho_low": np.nan, "rho_high": np.nan}
    if min(won.sum(), (~won).sum()) < FEWEST or np.ptp(values) == 0:
        return missing | {"not told": f"fewer than {FEWEST} pairs of one outcome, or one value alone"}
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    rng, drawn = np.random.default_rng(0), []
    for _ in range(500):
        rows = np.concatenate([members[at] for at in rng.integers(0, len(members), len(members))])
        if 0 < won[rows].sum() < len(rows) and np.ptp(values[rows]) > 0:
            drawn.append(spearman(values[rows], won[rows]))
    found = estimate(spearman(values, won), np.array(drawn), n_groups=len(members))
    return {"rho": found.value, "rho_low": found.low, "rho_high": found.high}
