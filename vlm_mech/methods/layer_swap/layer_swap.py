"""The layer swap as one call: every layer and span patched, the table with its statistics, and what it says."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from vlm_mech.architectures.site import Site
from vlm_mech.data.fitting import Variety, fitting
from vlm_mech.data.nouns import nouns_in
from vlm_mech.data.pairs import DIRECTIONS, Pairs
from vlm_mech.inputs.span import listed
from vlm_mech.interventions.receipt import add_up, summarise
from vlm_mech.methods.gates.gated import Asked, Options, gated
from vlm_mech.methods.layer_swap.claims import claimable, edit_of, pool_of, removed_of
from vlm_mech.methods.layer_swap.controls import DONOR, Donors, donors_of
from vlm_mech.methods.layer_swap.data import default_spans, open_layers, swap_sites
from vlm_mech.methods.layer_swap.figures import drawn
from vlm_mech.methods.layer_swap.findings import findings
from vlm_mech.methods.layer_swap.study import check_asked, metrics_of, swap_states
from vlm_mech.results.figures import drawn_by
from vlm_mech.results.plotted import PLOT
from vlm_mech.results.result import Result
from vlm_mech.runs.provenance import about, remarks
from vlm_mech.sweeps.asked import check_call
from vlm_mech.sweeps.measures import Comparison
from vlm_mech.sweeps.readings import without_trivial_places

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

QUESTION = (
    "At which layer, and through which tokens, does the answer come to depend on the image? Each question is asked "
    "about an image and its counterfactual, which differs in one attribute and so has another answer. Hidden states "
    "are patched from one run into the other at one layer and one token span. The recovered fraction is how far the "
    "answer shifts: 0 (unchanged) to 1 (the other image's answer)."
)
OF_ITEMS = (
    "At which layer, and through which tokens, does the answer come to depend on the image? Each question is asked "
    "about an image and a substitute image. Hidden states are patched from one run into the other at one layer and "
    "one token span. The recovered fraction is how far the preference for the correct over a wrong answer shifts: 0 "
    "(as in the patched run) to 1 (as in the source run)."
)
OF_TEXTS = (
    "At which layer, and through which tokens, does the answer come to depend on the subject? Each text is paired "
    "with one about another subject, which has another answer. Hidden states are patched from one run into the other "
    "at one layer and one token: the subject's last, or the text's last. The recovered fraction is how far the answer "
    "shifts: 0 (unchanged) to 1 (the other text's answer)."
)


def layer_swap(
    vlm: "VLM",
    pairs: Pairs,
    *,
    site: str = "llm",
    point: str = "resid_post",
    spans: str | Sequence[str] = (),
    directions: str | Sequence[str] = DIRECTIONS,
    only_correct: bool = True,
    measure: Comparison = "logit_diff",
    variants: Variety = "likeliest",
    control: str | Sequence[str] = (),
    batch: int = 32,
    engine: str = "fast",
    memory: int | str | None = None,
    gates: Literal["none", "quick", "all"] = "quick",
    null: int = 5,
    seed: int = 0,
) -> Result:
    """Activation patching (an interchange intervention) between the two images of each pair, at every layer and span.

    Pairs that the model cannot be asked (their prompts have unlike tokens, or one answer begins the other) are left
    out; they are listed under `refused` in the provenance and counted in the findings.

    Args:
        site: `llm`, `projector` or `vision`; `point` is the tensor of each block.
        spans: spans of tokens to swap; by default `image`, `question`, `last` and `all` in the decoder (of two texts
            `subject_last`, the last token of what each is about, and `last`; and
            `last+answer` where tokens of answers are compared that others of the answer come before), `image` at the
            projector, and `image`, `class` and `all` in a tower with class tokens (`image` in others).
        directions: `noising` puts the counterfactual's states into the image's run, `denoising` the reverse.
        only_correct: leave out pairs that the model answers wrongly on either image.
        measure: how the two answers of a pair are compared: `logit_diff` at the first token where they part,
            `logprob_diff` as a whole, `logprob_diff_per_token` by the means over their tokens.
        variants: spellings of the answers: "likeliest" takes the one that the model finds most probable on some of the
            pairs, "the" also tries that word before, "max" counts the likeliest each time, "as-written" tries none.
        control: whose states are swapped in besides the counterfactual's: "same-answer" takes those of another pair
            with the run's own answer, "other-object" those of another question to which the other answer is right; one
            or several. Donors are of another group, with their tokens laid out alike. By default none: each costs as
            many swaps again.
        batch: pairs per forward pass.
        engine: `fast` computes only what can change; `trace` runs a whole forward pass for each cell (the reference).
        memory: bytes it may take beyond the model, such as "2GiB"; the pairs are halved where they do not fit.
        gates: robustness checks of claims: "none" but the half of the pairs that did not choose them; "quick":
            resamples of the pairs too; "all", as the command has it by default: the same analysis of models with
            shuffled weights, and of shuffled answers.
        null: models with shuffled weights, and shuffles of the answers, that "all" compares with.
        seed: parts the pairs in halves, and draws donors and what is random in the gates.

    Returns:
        A row per pair and cell of direction, span (with a control: and donor) and layer (or point of the projector),
        with the metrics `recovered`,
        `logit_diff` (or what `measure` names) and `flip`; `findings` says how many pairs count, and at which layers the
        answer turns, which `claims` has with all numbers. The provenance has what that of
        `python -m experiments.layer_swap` has, less versions and settings.

    Raises:
        UsageError: a span, a direction, a control or gates that are not known, no pair that fits, a donor
            for fewer than two pairs, or a batch below 1.
        WorkError: fewer than two pairs count.
    """
    check_call(vlm, pairs, "layer_swap", batch=(batch, 1))
    asked = Options(gates, null, seed, batch)
    sites = swap_sites(vlm, site, point)
    pairs = fitting(vlm, pairs, variants=variants, whole=measure != "logit_diff")
    spans = listed(spans) or default_spans(vlm, site, pairs=pairs, measure=measure)
    directions = listed(directions)
    check_asked(spans, directions)
    controls = donors_of(vlm, pairs, listed(control), directions=directions, seed=seed)
    how: dict[str, Any] = {"directions": directions, "only_correct": only_correct, "measure": measure}
    how |= {"controls": controls, "engine": engine, "memory": memory}
    starts = range(0, len(pairs), batch)
    done = [swap_states(vlm, pairs[start : start + batch], sites, spans, **how) for start in starts]
    table = pd.concat([rows for rows, _ in done], ignore_index=True)
    provenance = about(question_of(pairs), vlm, pairs, add_up([summarise(receipts) for _, receipts in done]))
    result = with_claims(swap_result(site, table, provenance, measure, controls), asked, vlm, pairs, sites, spans, how)
    result = told(result, pairs)
    return dataclasses.replace(result, findings=(*result.findings, *remarks(provenance)))


def question_of(pairs: Pairs) -> str:
    """What a swap asks of pairs, of pairs of texts, or of single items."""
    return OF_TEXTS if pairs.is_text else QUESTION if pairs.made is None else OF_ITEMS


def swap_result(
    site: str,
    table: pd.DataFrame,
    provenance: dict[str, Any],
    measure: Comparison = "logit_diff",
    controls: Donors | None = None,
) -> Result:
    """The rows of `swap_states` as a result; with controls an axis says whose states a swap took."""
    depth = "point" if site == "projector" else "layer"
    table, metrics = without_trivial_places(table, [measure]), metrics_of(measure, nouns_in(provenance))
    axes, told = ("direction", "span", depth), provenance | {PLOT: drawn_by(drawn)}
    if controls is not None:
        axes, told = ("direction", "span", DONOR, depth), told | {"controls": controls.told}
    return Result(f"layer swap ({site})", table, axes, metrics, {}, told)


def with_claims(
    result: Result,
    asked: Asked,
    vlm: "VLM",
    pairs: Pairs,
    sites: Sequence[Site],
    spans: Sequence[str],
    how: dict[str, Any],
) -> Result:
    """The result of a swap of pairs at sites and spans with what is claimed of it.

    Args:
        asked: how claims are tested.
        how: the further options of `swap_states`.
    """
    stream, _, point = sites[0].name.partition(".")
    layers = open_layers(vlm, stream, point)
    again = how | {"only_correct": False, "part": None}

    controls: Donors | None = how.get("controls")

    def measured(vlm: "VLM", pairs: Pairs) -> pd.DataFrame:
        # Pairs in other words, or with the answers of others, have other donors.
        drawn = None if controls is None else controls.afresh(vlm, pairs)
        return swap_states(vlm, pairs, sites, claimable(spans), **again | {"controls": drawn})[0]

    what = (result, pool_of(layers), measured, edit_of(sites), removed_of(sites))
    return dataclasses.replace(result, claims=gated(asked, vlm, pairs, *what, at_once=controls is not None))


def told(result: Result, pairs: Pairs) -> Result:
    """The result with what it says."""
    return dataclasses.replace(result, findings=findings(result, pairs))
