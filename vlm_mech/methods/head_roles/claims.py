"""What is claimed of heads: that one holds a run's answer at the last token, and that a group of them is needed."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from vlm_mech.architectures.site import Site
from vlm_mech.interventions.specification import Replace
from vlm_mech.methods.gates.manifold import ClaimEdit, EditOf
from vlm_mech.methods.gates.removals import Removed, RemovedOf
from vlm_mech.methods.head_roles.ablation import RANDOM
from vlm_mech.methods.head_roles.data import FIRST, HEAD, INTO_FIRST, INTO_SECOND, OTHERS, SECOND, Group, named
from vlm_mech.results.claim import Claim, Condition, Side
from vlm_mech.results.claiming import least
from vlm_mech.results.gates import Pool
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs

HOLDS, HOLDS_AGAINST, NEEDED = "holds", "holds against", "needed"
"""Kinds of claims: a head carries the answer of the run that it comes from, or the other one's; a group is needed."""
LESS_OTHERS = "minus the mean effect of the layer's other heads:"
BACK = "in the opposite direction:"


def pool(result: Result) -> tuple[Claim, ...]:
    """That a head's output, put from either run into the other, brings the answer of the run that it comes from.

    Every head is asked. The difference of answers must move by `claiming.least` in both directions, and by as much more
    than averaged over the other heads of the layer, which is what a random head of that layer does.

    Args:
        result: of `patch_heads`.
    """
    name, enough, found = "logit_diff", least(result, "logit_diff"), []
    cells = result.cells
    several = len(set(cells["head"])) > 1
    for row in cells.to_dict("records"):
        if (str(row["of"]), str(row["direction"])) != (HEAD, INTO_FIRST):
            continue
        place = {"layer": row["layer"], "head": row["head"]}
        for kind, sides, word in (
            (HOLDS, ("below", "above"), "carries the answer of its source run"),
            (HOLDS_AGAINST, ("above", "below"), "carries the answer of the run it is patched into"),
        ):
            conditions = []
            for direction, side in zip((INTO_FIRST, INTO_SECOND), sides, strict=True):
                cell = {"of": HEAD, "direction": direction, **place}
                says = "" if direction == INTO_FIRST else BACK
                conditions.append(Condition(name, cell, _side(side), enough, less="baseline", says=says))
                if several:
                    others = {**cell, "of": OTHERS}
                    conditions.append(Condition(name, cell, _side(side), enough, less=others, says=LESS_OTHERS))
            says = (
                f"the output of layer {row['layer']} head {row['head']} at the last token {word}, in both directions,"
            )
            says += f" changing {name} in the first run"
            found.append(Claim(kind, place, says, tuple(conditions), result.metric(name).unit))
    return tuple(found)


def _side(side: str) -> Side:
    return "below" if side == "below" else "above"


def edit_of() -> EditOf:
    """The exchange of a claim in the first run; the second is that of the other picture."""

    def made(claim: Claim, pairs: "Pairs") -> ClaimEdit | str:
        removed = _removed(claim)
        return ClaimEdit(Replace(removed.sites, "last", heads=removed.heads, source=pairs.counterfactual))

    return made


def removed_of() -> RemovedOf:
    """The output that such an exchange replaces."""
    return _removed


def _removed(claim: Claim) -> Removed:
    site = Site("llm.head_out", claim.about["layer"])
    return Removed((site,), "last", (claim.about["head"],), exchanged=True)


def pool_of_groups(groups: Mapping[str, Group]) -> Pool:
    """What can be said of ablated groups.

    Args:
        groups: heads by name, chosen on the selection half of the examples.
    """
    return partial(_of_groups, groups=groups)


def _of_groups(result: Result, *, groups: Mapping[str, Group]) -> tuple[Claim, ...]:
    """That ablating a group moves the difference away from a run's answer, by more than random heads on average."""
    enough, found, cells = least(result, "logit_diff"), [], result.cells
    first = {heads: name for name, heads in reversed(list(groups.items()))}
    held = set(cells.itertuples(index=False, name=None))
    for run, way, name in held:
        # A group that has the heads of another one is asked about once.
        if name not in groups or first[groups[name]] != name:
            continue
        side, does = ("below", "lowers") if run == FIRST else ("above", "raises")
        cell = {"run": run, "way": way, "heads": name}
        conditions = [Condition("logit_diff", cell, _side(side), enough, less="baseline")]
        if (run, way, RANDOM + name) in held:
            less = {**cell, "heads": RANDOM + name}
            says = "minus the mean effect of random heads in the same layers:"
            conditions.append(Condition("logit_diff", cell, _side(side), enough, less=less, says=says))
        members = [{"layer": layer, "head": head} for layer, head in groups[name]]
        about = {**cell, "members": members}
        says = f"{way} ablation of the {name} heads ({named(groups[name])}) {does} logit_diff in the {run} run"
        found.append(Claim(NEEDED, about, says, tuple(conditions), result.metric("logit_diff").unit))
    found.sort(key=lambda claim: (list(groups).index(claim.about["heads"]), claim.about["run"] == SECOND, claim.says))
    return tuple(found)
