"""What a map says: descriptions of both ends of the decoder, and its claims, the only sentences that name a layer."""

import pandas as pd

from vlm_mech.errors import TooFewError
from vlm_mech.methods.layer_swap.study import compared_by, no_gap
from vlm_mech.methods.lens.named_patches import FLOORS, PATCHES
from vlm_mech.methods.visual_flow.claims import NAMES_OF, PLACES, TOKENS
from vlm_mech.methods.visual_flow.data import Cases, edges, spans
from vlm_mech.methods.visual_flow.study import INPUT, KNOCKOUT, LENS, PROBE, SHUFFLED, SWAP, difference_of
from vlm_mech.results.claim import sentences_told
from vlm_mech.results.result import Result


def findings(result: Result, cases: Cases) -> tuple[str, ...]:
    """The examples, what is decodable and preferred at the ends of the decoder, and what is claimed.

    Raises:
        TooFewError: fewer than two examples, of which nothing can be said.
    """
    if len(cases) < 2:
        raise TooFewError(f"{cases.pairs.name} gives {len(cases)} example; at least two are needed")
    summary = result.summary()
    decodable = _decodable(summary) if PROBE in set(summary["method"]) else ()
    said = (_examples(result, cases), *decodable, _preferred(result, summary, cases), *_few(result, summary, cases))
    return (*said, *_named(result), *_claimed(result))


def _named(result: Result) -> tuple[str, ...]:
    """What each lens names of generated scenes, where its layer was chosen by other scenes."""
    found = []
    for each in result.provenance.get("named", {}).get("told", ()):
        own = each[PATCHES]
        floors = "; ".join(f"{each[floor]['baseline']:.2f} by words of {FLOORS[floor]}" for floor in FLOORS)
        found.append(
            f"The {each['lens']} names the kind or colour shown in {own['mean']:.2f} of the patches of "
            f"{own['n']} generated scenes, at a depth chosen on other scenes. Floors: {floors}. The difference from "
            f"the first floor is {own['effect_low']:+.2f} to {own['effect_high']:+.2f}."
        )
    return tuple(found)


def _examples(result: Result, cases: Cases) -> str:
    text = f"{len(cases)} examples of {cases.pairs.name}, including wrongly answered ones; the rival is {cases.rival}"
    why = no_gap(compared_by(difference_of(result)))
    close = len(set(result.table.loc[result.table["skipped"] == why, "example"]))
    text += f"; {close} have no recovered fraction because the {why}" if close else ""
    return f"{text}."


def _rows(summary: pd.DataFrame, method: str, metric: str, span: str) -> pd.DataFrame:
    chosen = (summary["method"] == method) & (summary["metric"] == metric) & (summary["stream"] == "llm")
    return pd.DataFrame(summary[chosen & (summary["span"] == span)].sort_values("layer", kind="stable"))


def _number(row: pd.Series) -> str:
    return f"{row['mean']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f}, n = {row['n']})"


def _decodable(summary: pd.DataFrame) -> tuple[str, ...]:
    """At both ends of the decoder, so that no layer is chosen by its score."""
    found = []
    for span, where in PLACES.items():
        ends = {}
        for method in (PROBE, SHUFFLED):
            for metric in ("accuracy", "p_true", "p_rival"):
                ends[method, metric] = _rows(summary, method, metric, span)
        accuracy, control = ends[PROBE, "accuracy"], ends[SHUFFLED, "accuracy"]
        places = [number for number, layer in enumerate(accuracy["layer"]) if span == "object" or layer != INPUT]
        first = "at the decoder's input" if span == "object" else "after the first probed block"
        chosen = ((places[0], first), (places[-1], "after the last block"))
        true, rival = (ends[PROBE, metric]["mean"].tolist() for metric in ("p_true", "p_rival"))
        each = [
            f"{at} {_number(accuracy.iloc[place])}, P(answer) {true[place]:.2f}, P(rival) {rival[place]:.2f}"
            for place, at in chosen
        ]
        text = f"decodable: at {where}, accuracy of a linear probe: {'; '.join(each)}"
        controls = " and ".join(f"{control.iloc[place]['mean']:.2f}" for place, _ in chosen)
        found.append(f"{text}; with shuffled labels {controls}.")
    return tuple(found)


def _preferred(result: Result, summary: pd.DataFrame, cases: Cases) -> str:
    rows = _rows(summary, LENS, "lead", cases.said)
    text = f"preferred: at {TOKENS[cases.said]} the lens gives the answer a lead over {cases.rival} of"
    unit = result.metric("lead").unit
    return f"{text} {_number(rows.iloc[0])} {unit} at the decoder's input and of {_number(rows.iloc[-1])} at the end."


def _few(result: Result, summary: pd.DataFrame, cases: Cases) -> tuple[str, ...]:
    """What too few examples have."""
    found, name = [], difference_of(result)
    n = int(min(_rows(summary, SWAP, "recovered", span)["n"].min() for span in spans(cases.said)))
    if n < 2:
        found.append(f"used: too few examples have a recovered fraction ({n}).")
    for edge in edges(cases.said):
        rows = _rows(summary, KNOCKOUT, name, edge)
        if len(rows) and (most := int(rows["n"].max())) < 2:
            found.append(f"needed: too few examples have the edge {edge} ({most}).")
    return tuple(found)


def _claimed(result: Result) -> tuple[str, ...]:
    """How claims came about, those that follow from no other one, and of what no claim is made."""
    held = {claim.kind for claim in result.claims if claim.made}
    none = [name for kind, name in NAMES_OF.items() if kind not in held]
    unclaimed = [f"No claim is made about: {'; '.join(none)}."] if none else []
    return (*sentences_told(result.claims), *unclaimed)
