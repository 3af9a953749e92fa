"""Head roles as one call: patching in both directions, the rule, scores, groups ablated beside random heads, claims."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from vlm_mech.data.fitting import Variety, fitting
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import TooFewError, UsageError
from vlm_mech.methods.gates.gated import Options, through_gates
from vlm_mech.methods.head_roles.ablation import Ablated, ablate_groups, p_of_draws
from vlm_mech.methods.head_roles.claims import edit_of, pool, pool_of_groups, removed_of
from vlm_mech.methods.head_roles.data import (
    PROMOTING,
    ROUTING,
    SUPPRESSING,
    VISUAL,
    WAYS,
    WRITING,
    Group,
    Runs,
    runs_of,
    with_prior,
)
from vlm_mech.methods.head_roles.figures import drawn
from vlm_mech.methods.head_roles.findings import findings
from vlm_mech.methods.head_roles.study import (
    AXES,
    METRICS,
    counted,
    leading,
    patch_heads,
    points_of,
    roles_of,
    score_heads,
)
from vlm_mech.results.claim import Claim
from vlm_mech.results.claiming import claimed, corrected_together, halves, parted_like
from vlm_mech.results.figures import drawn_by
from vlm_mech.results.plotted import PLOT
from vlm_mech.results.result import Found, Result
from vlm_mech.runs.provenance import about, remarks
from vlm_mech.sweeps.asked import check_call

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

QUESTION = (
    "Which heads at the last token carry the answer of one of two runs? Each head's output is patched from either run "
    "into the other. Heads that stand out in both directions are ablated on other examples, compared with random "
    "heads of the same layers."
)


@dataclass(frozen=True, eq=False)
class HeadRoles(Found):
    """What `head_roles` gives.

    `result` is the patching, with the claims and findings of all; `heads` has a row a head: its mean recovered fraction
    in both directions, its score along the first component and its role, of the half that chooses. `scores` is what
    heads look at and write, of all examples that count; `groups` names the heads of each group; `ablated` is what
    ablating these did, None where no group has a head.
    """

    result: Result
    heads: pd.DataFrame
    scores: Result
    groups: dict[str, Group]
    ablated: Ablated | None


def head_roles(
    vlm: "VLM",
    pairs: Pairs,
    *,
    prior_question: str | Sequence[str] | None = None,
    prior_answers: Sequence[str] | None = None,
    by: Literal["ratios", "means"] = "ratios",
    only_correct: bool = True,
    ablate: str | Sequence[str] = WAYS,
    n_top: int | None = None,
    n_random: int = 100,
    variants: Variety = "likeliest",
    batch: int = 32,
    engine: str = "fast",
    memory: int | str | None = None,
    gates: Literal["none", "quick", "all"] = "quick",
    null: int = 5,
    seed: int = 0,
) -> HeadRoles:
    """What each attention head does at the last token, between two runs of each example (after arXiv 2606.28273).

    The first run is that of each pair's picture; the second that of its other picture, or, with `prior_question`, the
    same picture under a question about what is usual. Every head's output at the last position is put from each run
    into the other. On one half of the examples the first component of the heads' recovered fractions chooses promoting
    and suppressing heads; so do scores of looking, routing and writing, `n_top` heads each. On the other half each
    group is ablated, beside its heads alone and random heads of the same layers.

    Args:
        vlm: the model.
        pairs: two pictures each, or with `prior_question` pictures that contradict what is usual.
        prior_question: what is asked in the second run: one text for all, or one a pair.
        prior_answers: the usual answer of each pair; by default the pairs' own `prior`.
        by: whether heads are chosen by means of "ratios" over examples, as published, or by the ratio of "means", in
            which examples with a small gap count little.
        only_correct: leave out the examples that are not answered as they should be in both runs.
        ablate: ways of ablation: `zero`, `mean` over the examples, `resample` from another one.
        n_top: heads of each group chosen by a score; by default a twentieth of all heads, one at least.
        n_random: random groups at most, beside each group.
        variants: spellings of the answers, as for `layer_swap`.
        batch: examples per forward pass.
        engine: `fast`, or `trace` for the reference.
        memory: bytes it may take beyond the model, such as "2GiB".
        gates: robustness checks of claims, as for `layer_swap`.
        null: models with shuffled weights, and shuffles of the answers, that "all" compares with.
        seed: parts the examples, and draws what is random.

    Returns:
        The patching with what is claimed, a row a head, the scores, and what ablations did. Flips are told twice: by
        the logits of the two answers, and by whether greedy decoding still says what it said.

    Raises:
        UsageError: a way of ablation that is not known, numbers that cannot be, prior answers without a question, a
            pair without a usual answer, or pairs that do not fit the model.
        TooFewError: fewer than four examples count.
    """
    least = {"batch": (batch, 1), "n_random": (n_random, 1), "n_top": (1 if n_top is None else n_top, 1)}
    check_call(vlm, pairs, "head_roles", **least)
    ways = (ablate,) if isinstance(ablate, str) else tuple(ablate)
    _check(ways, by, prior_question, prior_answers, pairs)
    asked, runs = Options(gates, null, seed, batch), _fitted(vlm, pairs, prior_question, prior_answers, variants)
    how: dict[str, Any] = {"batch": batch, "engine": engine, "memory": memory}
    every, receipts = patch_heads(vlm, runs, **how)
    table = counted(every, only_correct=only_correct)
    provenance = about(QUESTION, vlm, runs.pairs, receipts) | {"second run": _told(runs), PLOT: drawn_by(drawn)}
    result = Result("head roles", table, AXES, METRICS, {}, provenance)
    parts = halves(result, seed=seed)
    if parts is None:
        raise TooFewError(f"{_n_counted(result)} of {len(runs.pairs)} examples count; at least 4 are needed")
    choosing, testing = (_names(part) for part in parts)
    heads = roles_of(points_of(parts[0]), by=by)
    kept = _some(runs, {*choosing, *testing})
    scores = score_heads(vlm, kept, batch=batch)
    groups = _groups(heads, scores, choosing, n_top or max(1, len(heads) // 20))
    done = ablate_groups(vlm, kept, groups, testing, ways=ways, n_random=n_random, seed=seed, **how) if groups else None
    claims = _claims(asked, vlm, runs, result, parts, done, groups, how)
    told = provenance | {"by": by, "heads": _rows(heads)} | _told_of(groups, done)
    told |= {"n": {"choosing": len(choosing), "testing": len(testing)}}
    result = dataclasses.replace(result, provenance=told, claims=claims)
    result = dataclasses.replace(result, findings=(*findings(result), *remarks(told)))
    return HeadRoles(result, heads, scores, groups, done)


def _check(ways: Sequence[str], by: str, question: Any, answers: Any, pairs: Pairs) -> None:
    wrong = [each for each in ways if each not in WAYS]
    if wrong or not ways:
        raise UsageError(f"ablate is {wrong[0] if wrong else ways!r}; {', '.join(WAYS)} are known")
    if by not in ("ratios", "means"):
        raise UsageError(f"by is {by!r}; ratios or means is needed")
    if question is None and answers is not None:
        raise UsageError("prior_answers are given without a prior_question")
    if not isinstance(question, str | None) and len(list(question)) != len(pairs):
        raise UsageError(f"prior_question has {len(list(question))} texts for {len(pairs)} pairs")


def _fitted(vlm: "VLM", pairs: Pairs, question: Any, answers: Sequence[str] | None, variants: Variety) -> Runs:
    """Both runs of the pairs that fit the model, with their answers spelled as it would."""
    if question is None:
        return runs_of(fitting(vlm, pairs, variants=variants), None)
    texts = [question] * len(pairs) if isinstance(question, str) else list(question)
    by_pair = {pair.id: text for pair, text in zip(pairs, texts, strict=True)}
    fitted = fitting(vlm, with_prior(pairs, answers), variants=variants, alone=True)
    return runs_of(fitted, [by_pair[pair.id] for pair in fitted])


def _told(runs: Runs) -> str:
    return "the same image, asked what is usual" if runs.asks_prior else "the other image, asked the same"


def _told_of(groups: dict[str, Group], done: Ablated | None) -> dict[str, Any]:
    """The groups and what ablating them did, as JSON values."""
    return {
        "groups": {name: [list(each) for each in some] for name, some in groups.items()},
        "ablations": [] if done is None else _ablations(done),
        "redundant": [] if done is None else _rows(done.redundant),
    }


def _n_counted(result: Result) -> int:
    return int(result.table[result.table["logit_diff"].notna()]["example"].nunique())


def _names(part: Result) -> list[str]:
    """The examples of a part that count."""
    return part.table.loc[part.table["logit_diff"].notna(), "example"].drop_duplicates().tolist()


def _some(runs: Runs, names: set[str]) -> Runs:
    """The runs of some examples."""
    held = [(pair, second) for pair, second in zip(runs.pairs, runs.second, strict=True) if pair.id in names]
    pairs, second = zip(*held, strict=True)
    return dataclasses.replace(runs, pairs=dataclasses.replace(runs.pairs, pairs=tuple(pairs)), second=tuple(second))


def _groups(heads: pd.DataFrame, scores: Result, choosing: Sequence[str], n_top: int) -> dict[str, Group]:
    """The heads of each group that has any, chosen on some examples."""
    found: dict[str, Group] = {}
    for role in (PROMOTING, SUPPRESSING):
        some = heads[heads["role"] == role]
        found[role] = tuple((int(layer), int(head)) for layer, head in zip(some["layer"], some["head"], strict=True))
    found[VISUAL] = leading(scores, "visual", choosing, n_top)
    found[ROUTING] = leading(scores, "routing", choosing, n_top, magnitude=True)
    found[WRITING] = leading(scores, "writes_answer", choosing, n_top)
    return {name: tuple(sorted(group)) for name, group in found.items() if group}


def _claims(
    asked: Options,
    vlm: "VLM",
    runs: Runs,
    result: Result,
    parts: tuple[Result, Result],
    done: Ablated | None,
    groups: dict[str, Group],
    how: dict[str, Any],
) -> tuple[Claim, ...]:
    """What is claimed of single heads and of groups, corrected together, each with its gates."""
    first = claimed(pool(parts[0]), result, seed=asked.seed, parts=parts)
    second: tuple[Claim, ...] = ()
    of_groups = pool_of_groups(groups)
    if done is not None:
        alike = parted_like(done.result, parts)
        second = claimed(of_groups(alike[0]), done.result, seed=asked.seed, parts=alike)
    every = corrected_together(first, second)
    singles, joint = every[: len(first)], every[len(first) :]

    def again(vlm: "VLM", pairs: Pairs) -> pd.DataFrame:
        return patch_heads(vlm, runs_of(pairs, None), **how, check=0)[0]

    same = "the second run asks another question, which other answers and wordings have no version of"
    ways = (same, None, None) if runs.asks_prior else (again, edit_of(), removed_of())
    singles = through_gates(asked, singles, vlm, runs.pairs, result, pool, *ways)
    if done is not None:
        why = "the group was chosen on these examples, and is not chosen again"
        joint = through_gates(asked, joint, vlm, runs.pairs, done.result, of_groups, why)
    return (*singles, *joint)


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON values."""
    rows = table.to_dict("records")
    return [{str(name): None if value != value else value for name, value in row.items()} for row in rows]


def _ablations(done: Ablated) -> list[dict[str, Any]]:
    """Each group with the draws next to it, as JSON values."""
    found = []
    for row in done.groups.to_dict("records"):
        same = (done.draws[["group", "run", "way"]] == pd.Series({k: row[k] for k in ("group", "run", "way")})).all(
            axis=1
        )
        told: dict[str, Any] = {name: row[name] for name in ("group", "run", "way", "n")}
        for name in ("flip", "lost"):
            draws = done.draws.loc[same, name].tolist()
            told |= {name: row[name], f"{name}_draws": draws, f"{name}_p": p_of_draws(row[name], draws)}
        found.append(told)
    return found
