"""What the probes found, in sentences made from the numbers; layers are named by claims alone."""

from collections.abc import Sequence

import pandas as pd

from vlm_mech.methods.probing.claims import CANNOT, LEAST, READS, STREAMS, does_of, fair_controls, span_kind
from vlm_mech.methods.probing.controls import NONE, TASK
from vlm_mech.methods.probing.study import CONFLICT, TEST, Notes, summary_of
from vlm_mech.results.claim import Claim, sentences
from vlm_mech.results.claimed_layers import numbers, placed, runs
from vlm_mech.results.result import Result

ABOVE = "by"


def findings(result: Result, notes: list[Notes]) -> tuple[str, ...]:
    """Sentences for every model and probe: where the answer can be read, and what is read in conflict."""
    found = [sentences(result.claims)[0]]
    summary = summary_of(result)
    of_metric = [summary[summary["metric"] == metric] for metric in ("accuracy", "p_true", "p_prior")]
    accuracy, *both = (each.reset_index(drop=True) for each in of_metric)
    models = [step["model"] for step in notes if step["step"] == NONE]
    found += [_asked(result, accuracy, model) for model in models]
    for model in models:
        for probe in accuracy["probe"].drop_duplicates():
            found += readable(result, model, probe)
            found += _in_conflict(both, model, probe) if CONFLICT in set(accuracy["read_on"]) else []
    if CONFLICT not in set(accuracy["read_on"]):
        found.append(
            "No images in conflict were given (option conflict), so the usual answer's probability is not measured."
        )
    return tuple(found)


def _asked(result: Result, accuracy: pd.DataFrame, model: str) -> str:
    """How many examples were read, and what counts as reading."""
    rows = accuracy[(accuracy["model"] == model) & (accuracy["read_on"] == TEST) & (accuracy["control"] == NONE)]
    fair, held = fair_controls(result, model), set(accuracy.loc[accuracy["model"] == model, "control"])
    beyond = f" and above each control ({', '.join(fair)})" if fair else ""
    text = (
        f"{model}: probes are tested on {rows['n'].max():.0f} examples, the majority label is correct in "
        f"{rows['baseline'].iloc[0]:.2f}. The answer counts as decodable if accuracy is at least {LEAST} "
        f"above that{beyond}. Numbers below are accuracy minus that baseline, on the held-out half"
    )
    if TASK in held and TASK not in fair:
        text += f". The {TASK} is not used: its labels follow from the answers"
    return f"{text}."


def readable(result: Result, model: str, probe: str) -> list[str]:
    """What is claimed of a model and a probe, a sentence a span; of single patches and positions, how many are."""
    cells = result.cells
    asked = cells[(cells["model"] == model) & (cells["probe"] == probe) & (cells["read_on"] == TEST)]
    made = [claim for claim in result.claims if claim.made]
    made = [claim for claim in made if (claim.about["model"], claim.about["probe"]) == (model, probe)]
    found = []
    for kind, spans in asked["span"].drop_duplicates().groupby(asked["span"].map(span_kind), sort=False):
        some = [claim for claim in made if span_kind(claim.about["span"]) == kind]
        if len(spans) > 1:
            read = {claim.about["span"] for claim in some if does_of(claim) == READS}
            text = f"the answer can be read in some layer at {len(read)} of {len(spans)} spans {kind} (claims.json)"
        else:
            every = asked.loc[asked["span"] == spans.iloc[0], "place"].drop_duplicates()
            text = _of_span(some, every) or "no claim"
        found.append(f"{model}, {probe} probe, {kind}: {text}.")
    return found


def _of_span(claims: Sequence[Claim], places: pd.Series) -> str:
    """Where the answer can be read at a span, and where it cannot, stream by stream."""
    texts = []
    for does in (READS, CANNOT):
        parts = []
        for prefix, stream in STREAMS.items():
            some = [claim for claim in claims if does_of(claim) == does and claim.about["stream"] == stream]
            layers = [claim for claim in some if "layer" in claim.about]
            parts += [f"in the {stream} ({numbers([claim], ABOVE)})" for claim in some if "layer" not in claim.about]
            if layers:
                every = sorted(int(place.split("[")[1][:-1]) for place in places if place.startswith(f"{prefix}."))
                found = runs([claim.about["layer"] for claim in layers], every)
                at = placed(found, first=every[0], last=every[-1])
                at = "at every layer" if found == [(every[0], every[-1])] and len(every) > 1 else at
                parts.append(f"in the {stream} {at} ({numbers(layers, ABOVE)})")
        if parts:
            texts.append(f"the answer {does} {', '.join(parts)}")
    return "; ".join(texts)


def _in_conflict(both: Sequence[pd.DataFrame], model: str, probe: str) -> list[str]:
    """At the last place of each span: what is shown, against what is usual."""
    (shown, usual), found = both, []
    for span in shown["span"].drop_duplicates():
        chosen = (shown["model"] == model) & (shown["probe"] == probe) & (shown["span"] == span)
        chosen &= (shown["read_on"] == CONFLICT) & (shown["control"] == NONE)
        rows, others = shown[chosen], usual[chosen]
        if rows.empty:
            continue
        true, prior = rows.iloc[-1], others.iloc[-1]
        found.append(
            f"{model}, {probe} probe, {span}, in conflict (n = {true['n']:.0f}), at the last site: "
            f"P(shown) {_with_interval(true)}, P(usual) {_with_interval(prior)}."
        )
    return found


def _with_interval(row: pd.Series) -> str:
    return f"{row['mean']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f})"
