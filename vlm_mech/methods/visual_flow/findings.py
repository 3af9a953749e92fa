"""What a map says, a sentence a finding, made from its numbers."""

from collections.abc import Sequence

import pandas as pd

from vlm_mech.errors import TooFewError
from vlm_mech.methods.layer_swap.study import compared_by, no_gap
from vlm_mech.methods.visual_flow.claims import Claim, FlowClaims, Where
from vlm_mech.methods.visual_flow.data import LAST, WHOLE, Cases, edges, spans
from vlm_mech.methods.visual_flow.study import (
    CONTROL,
    INPUT,
    KNOCKOUT,
    LENS,
    PROBE,
    SHUFFLED,
    SWAP,
    difference_of,
)
from vlm_mech.results.claim import LEVEL
from vlm_mech.results.result import Result

TOKENS = {LAST: "the last token", WHOLE: "the last token and the answers' tokens"}
CORRECTED = "sign-flip test, Holm over all cells of the map"


def findings(result: Result, cases: Cases, said: FlowClaims) -> tuple[str, ...]:
    """One sentence for each of: examples, decodable, used, must flow, preferred, read, carry, suppress, overtaking.

    Raises:
        TooFewError: fewer than two examples, of which nothing can be said.
    """
    if len(cases) < 2:
        raise TooFewError(f"{cases.pairs.name} gives {len(cases)} example; at least two are needed")
    summary = result.summary()
    decodable = _decodable(summary, said) if PROBE in set(summary["method"]) else ()
    unit = result.metric("lead").unit
    return (
        _examples(result, cases),
        *decodable,
        _used(result, summary, cases.said),
        *_must_flow(result, summary, cases.said),
        _preferred(result, summary, cases, said),
        _reads(said, unit),
        _carries(said, TOKENS[cases.said]),
        _suppresses(said, unit),
        _overtaking(said, cases),
    )


def _examples(result: Result, cases: Cases) -> str:
    text = f"{len(cases)} examples of {cases.pairs.name}, those answered wrongly included; the rival is {cases.rival}"
    why = no_gap(compared_by(difference_of(result)))
    close = len(set(result.table.loc[result.table["skipped"] == why, "example"]))
    text += f"; in {close} the {why}, so that they have no recovered fraction" if close else ""
    return f"{text}."


def _rows(summary: pd.DataFrame, method: str, metric: str, span: str | None = None) -> pd.DataFrame:
    chosen = (summary["method"] == method) & (summary["metric"] == metric) & (summary["stream"] == "llm")
    rows = summary[chosen if span is None else chosen & (summary["span"] == span)]
    return pd.DataFrame(rows.sort_values("layer", kind="stable"))


def _number(row: pd.Series, *, of: str = "mean", digits: int = 2) -> str:
    low, high = ("ci_low", "ci_high") if of == "mean" else ("effect_low", "effect_high")
    sign = "" if of == "mean" else "+"
    return f"{row[of]:{sign}.{digits}f} ({row[low]:{sign}.{digits}f} to {row[high]:{sign}.{digits}f}, n = {row['n']})"


def _decodable(summary: pd.DataFrame, said: FlowClaims) -> tuple[str, ...]:
    """At both ends of the decoder, so that no layer is chosen by its score."""
    found = []
    for span, where in (("object", "the object's patches"), ("last", "the last token")):
        ends = {}
        for method in (PROBE, SHUFFLED):
            for metric in ("accuracy", "p_true", "p_rival"):
                ends[method, metric] = _rows(summary, method, metric, span)
        accuracy, control = ends[PROBE, "accuracy"], ends[SHUFFLED, "accuracy"]
        places = [number for number, layer in enumerate(accuracy["layer"]) if span == "object" or layer != INPUT]
        chosen = (places[0], places[-1])
        true, rival = (ends[PROBE, metric]["mean"].tolist() for metric in ("p_true", "p_rival"))
        told = [
            f"{_after(int(accuracy.iloc[at]['layer']))} {_number(accuracy.iloc[at])}, P(answer) {true[at]:.2f}, "
            f"P(rival) {rival[at]:.2f}"
            for at in chosen
        ]
        text = f"decodable: at {where} a linear probe finds the answer in these shares of examples: {'; '.join(told)}"
        controls = " and ".join(f"{control.iloc[at]['mean']:.2f}" for at in chosen)
        likelier = [claim.layer for claim in said.decoded.get(span, ())]
        above = (
            f"P(answer) is above P(rival) {_places(likelier)}" if likelier else "P(answer) is nowhere above P(rival)"
        )
        found.append(f"{text}; probes of shuffled labels there {controls}; {above} ({CORRECTED}).")
    return tuple(found)


def _places(layers: Sequence[int]) -> str:
    blocks = [str(layer) for layer in layers if layer != INPUT]
    told = ["in the decoder's input"] if INPUT in layers else []
    return " and ".join([*told, *([f"after block(s) {', '.join(blocks)}"] if blocks else [])])


def _after(layer: int) -> str:
    return "in the decoder's input" if layer == INPUT else f"after block {layer}"


def _used(result: Result, summary: pd.DataFrame, said: str) -> str:
    rows = {span: _rows(summary, SWAP, "recovered", span) for span in spans(said)}
    n = int(min(each["n"].min() for each in rows.values()))
    if n < 2:
        return f"used: too few examples have a recovered fraction ({n})."
    where = {"method": SWAP, "stream": "llm"}
    ends = result.crossing(where | {"span": "image"}, "layer", 0.5, rising=False, metric="recovered")
    starts = result.crossing(where | {"span": said}, "layer", 0.5, rising=True, metric="recovered")
    text = f"used: a swap of the image turns the answer (recovered > 0.5) {_until(ends)}"
    text += f", one of {TOKENS[said]} {_from(starts)}"
    question = rows["question"].loc[rows["question"]["mean"].idxmax()]
    return (
        f"{text}; one of the question at most {_after(int(question['layer']))}, recovered {_number(question)}; n = {n}."
    )


def _until(end: dict) -> str:
    interval = f"(95 % interval {_place(end['low'])} to {_place(end['high'])})"
    return f"no longer {_after(end['at'])} {interval}" if end["at"] is not None else "at every depth"


def _from(start: dict) -> str:
    if start["at"] is None:
        return "at no depth"
    return f"first {_after(start['at'])} ({_place(start['low'])} to {_place(start['high'])})"


def _place(layer: int | None) -> str:
    return "beyond the last" if layer is None else "input" if layer == INPUT else str(layer)


def _must_flow(result: Result, summary: pd.DataFrame, said: str) -> tuple[str, ...]:
    name, found = difference_of(result), []
    for edge in (each for each in edges(said) if len(_rows(summary, KNOCKOUT, name, each))):
        rows = _rows(summary, KNOCKOUT, name, edge)
        if int(rows["n"].max()) < 2:
            found.append(f"must flow: too few examples have the edge {edge} ({rows['n'].max()}).")
            continue
        # The correction is that of the summary, over all its cells of this metric.
        marked = rows[rows["p_corrected"] < LEVEL].sort_values("effect", kind="stable")
        ways = (("lowers", marked[marked["effect"] < 0]), ("raises", marked[marked["effect"] > 0][::-1]))
        told = [_cut(result, summary, edge, way, some) for way, some in ways if len(some)]
        none = "changes the answer's lead over the other image's at no layer significantly"
        found.append(f"must flow: cutting {edge} {'; it '.join(told) or none}.")
    return tuple(found)


def _cut(result: Result, summary: pd.DataFrame, edge: str, way: str, rows: pd.DataFrame) -> str:
    """What cuts do that all go one way, the strongest first."""
    strongest = rows.iloc[0]
    text = f"{way} the answer's lead over the other image's at layers {_all(sorted(rows['layer']))}, most at"
    text += f" {strongest['layer']}, by {_number(strongest, of='effect')} {result.metric('lead').unit}"
    return f"{text} ({_control(result, summary, edge, int(strongest['layer']))})"


def _control(result: Result, summary: pd.DataFrame, edge: str, layer: int) -> str:
    name = difference_of(result)
    rows = _rows(summary, CONTROL, name, edge)
    row = rows[rows["layer"] == layer].iloc[0]
    if int(row["n"]) < 2:
        return "there is no control of equal size"
    cell = {"span": edge, "stream": "llm", "layer": layer}
    less = result.contrast(cell | {"method": KNOCKOUT}, cell | {"method": CONTROL}, name)
    difference = f"difference {less['mean']:+.2f} ({less['ci_low']:+.2f} to {less['ci_high']:+.2f})"
    return f"as many random edges there {_number(row, of='effect')}, {difference}"


def _preferred(result: Result, summary: pd.DataFrame, cases: Cases, said: FlowClaims) -> str:
    rows = _rows(summary, LENS, "lead", cases.said)
    top, last = rows.loc[rows["mean"].idxmax()], rows.iloc[-1]
    text = f"preferred: at {TOKENS[cases.said]} the lens gives the answer a lead over {cases.rival} of {_number(last)}"
    text += f" {result.metric('lead').unit} at the end; its highest mean is {_number(top)} {_after(int(top['layer']))}"
    return f"{text} (p = {said.end.p:.2g} that the end is zero, {CORRECTED})."


def _all(layers: Sequence[int] | pd.Series) -> str:
    return ", ".join(str(layer) for layer in layers)


def _sized(claim: Claim) -> str:
    return f"{claim.layer} ({claim.effect:+.2f}, {claim.low:+.2f} to {claim.high:+.2f}, n = {claim.n})"


def _reads(said: FlowClaims, unit: str) -> str:
    if not said.reads:
        return f"read: no layer is said to read the image's answer ({CORRECTED})."
    both = [claim for claim in said.reads if claim.needed]
    alone = [claim for claim in said.reads if not claim.needed]
    told = []
    if both:
        told.append(f"layers {', '.join(map(_sized, both))}, where cuts hurt too")
    if alone:
        told.append(f"layers {', '.join(map(_sized, alone))}, where no cut of one layer hurts (others may stand in)")
    text = f"read: what a swap of the image does is lost, in {unit}, across {'; '.join(told)}"
    return f"{text}; the strongest is layer {_strongest(said.reading)}."


def _strongest(found: Where | None) -> str:
    return "none" if found is None or found.at is None else f"{found.at} ({found})"


def _carries(said: FlowClaims, last: str) -> str:
    if not said.writes:
        return f"carry: no layer is said to bring the image's answer to {last}."
    text = f"carry: the answer reaches {last} across layers {', '.join(map(_sized, said.writes))}"
    if not said.carries:
        return f"{text}; none is said to take it from the question."
    return f"{text}; from the question at layers {_all([claim.layer for claim in said.carries])}."


def _suppresses(said: FlowClaims, unit: str) -> str:
    if not said.pushes:
        return "suppress: no layer is said to lower the answer's lead."
    if not said.suppresses:
        text = f"suppress: the answer's lead falls across layers {', '.join(map(_sized, said.pushes))} {unit}"
        return f"{text}, but never after it had risen, so that no layer is called suppressing."
    text = (
        f"suppress: after it had risen the answer's lead falls across layers {', '.join(map(_sized, said.suppresses))}"
    )
    return f"{text} {unit}; most across layer {_strongest(said.suppressing)}."


def _overtaking(said: FlowClaims, cases: Cases) -> str:
    end = f"lead at the end {said.end.effect:+.2f}, {said.end.low:+.2f} to {said.end.high:+.2f}, n = {said.end.n}"
    found = said.overtaking
    if found is None or found.at is None:
        return f"overtaking: it is not said that {cases.rival} overtakes what is shown ({end})."
    text = f"overtaking: at {TOKENS[cases.said]} {cases.rival} leads for good from the output of block {found.at} on"
    text += ", so that what is shown never leads" if found.at == 0 else ""
    return f"{text} ({found}; {end})."
