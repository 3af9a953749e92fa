"""What was found of sinks, in sentences made from the result's numbers."""

from typing import Any

from vlm_mech.results.result import Result

WORDS = {"L": "sinks of the decoder (dimension rule)", "V": "sinks of the vision encoder (norm rule)"}


def findings(result: Result) -> tuple[str, ...]:
    """Which kinds of sinks are claimed and why, and how many image tokens are labelled.

    Args:
        result: that of `find_sinks`.
    """
    told = result.provenance
    found = [_kind(kind, each, told) for kind, each in told["verified"].items()]
    counts, whole = told["labels"], sum(told["labels"].values())
    n = result.table["example"].nunique()
    labelled = ", ".join(f"{counts[label]} {label}" for label in ("V", "L", "both"))
    found.append(f"Sinks among {whole} image tokens of {n} examples: {labelled}.")
    return tuple(found)


def _kind(kind: str, verified: dict[str, Any], told: dict[str, Any]) -> str:
    """One kind: claimed or not, and why."""
    dims = f" in dimension(s) {', '.join(map(str, told['dims']))}" if kind == "L" and told["dims"] else ""
    where = f"on the {verified['n']} held-out images that have some" if verified["n"] else ""
    if verified["holds"]:
        return f"There are {WORDS[kind]}{dims}: {where}, they get {verified['says']}."
    return f"No {WORDS[kind]} are claimed{dims}: {verified['says']}."
