"""What the first screen of a report says: the question in a sentence, some short findings, and a table of claims."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlm_mech.results.claim import LEVEL, Claim, decides, sentences, sentences_told, told
from vlm_mech.results.result import Result
from vlm_mech.results.statistics import smallest_attainable_p

MOST_WORDS = 25
"""Words of a sentence on the first screen; longer findings are in the list of all findings."""
N_FINDINGS = 3
N_CLAIMS = 6
"""Claims in the table of the first screen."""
UNASKED = "This run tests no claims; see its findings and tables."
UNDECLARED = "No claim was selected: no effect was large and significant on the selection half of the examples."


@dataclass(frozen=True)
class Row:
    """A claim in the table of the first screen, with the numbers of the condition that decides it."""

    claim: str
    effect: str
    interval: str
    unit: str
    n: str
    gates: str


@dataclass(frozen=True)
class FirstScreen:
    """Short findings, claims under what became of them, and what is to be said of there being none."""

    findings: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Row, ...]], ...]
    said: tuple[str, ...]

    @property
    def unit(self) -> str:
        """The unit of all effects; empty where they have several."""
        units = {row.unit for _, some in self.rows for row in some}
        return units.pop() if len(units) == 1 else ""


def question_of(text: str) -> tuple[str, str]:
    """The first sentence of what is asked, and the rest."""
    first, *rest = re.split(r"(?<=[.?!])\s+(?=[^a-z\s])", text.strip(), maxsplit=1)
    return first, " ".join(rest)


def is_short(finding: str) -> bool:
    """Whether a finding may stand on the first screen."""
    return len(finding.split()) <= MOST_WORDS


def first_screen(result: Result) -> FirstScreen:
    """What the first screen says of a result, which has everything in its other sections."""
    claims = result.claims
    in_table = {*sentences(claims), *sentences_told(claims)} if claims else {sentences(claims)[0]}
    short = [each for each in result.findings if each not in in_table and is_short(each)]
    rows, said = _rows(claims), list(_said(result))
    left = len(claims) - sum(len(some) for _, some in rows)
    said += [f"{left} more {'is' if left == 1 else 'are'} under All claims."] if left else []
    return FirstScreen(tuple(short[:N_FINDINGS]), rows, tuple(said))


def _rows(claims: Sequence[Claim]) -> tuple[tuple[str, tuple[Row, ...]], ...]:
    """The claims that hold, those that lost fewest gates and those that need telling first; then the others."""
    first = told(claims)
    made = sorted((each for each in claims if each.made), key=lambda each: (len(each.lost), each not in first))
    others = [each for each in claims if not each.made]
    shown = [made[:N_CLAIMS], others[: max(0, N_CLAIMS - len(made))]]
    headings = (f"Confirmed on held-out examples ({len(made)})", f"Not confirmed ({len(others)})")
    named = zip(headings, shown, strict=True)
    return tuple((heading, tuple(_row(each) for each in some)) for heading, some in named if some)


def _row(claim: Claim) -> Row:
    tried = [gate for gate in claim.gates if gate.verdict is not None]
    gates = f"{sum(bool(gate.verdict) for gate in tried)} of {len(tried)}" if claim.gates else "not run"
    if not claim.tested:
        return Row(claim.says, "not tested", "", "", "", gates)
    own = claim.tested[decides(claim)]
    return Row(claim.says, f"{own.mean:+.2f}", f"({own.low:+.2f} to {own.high:+.2f})", claim.unit, str(own.n), gates)


def _said(result: Result) -> tuple[str, ...]:
    """Why no claim stands in the table, or none that holds; the smallest attainable p where n forbids significance."""
    claims, n_groups = result.claims, len(set(result.groups().tolist()))
    if any(claim.made for claim in claims):
        return ()
    if claims:
        n = max((each.tested[0].n for each in claims if each.tested), default=0)
        p = smallest_attainable_p(n, len(claims))
        few = f"From {n} examples the smallest attainable corrected p is {p:.2g}, so no claim can be confirmed."
        return ("No claim is confirmed.", *([few] if p >= LEVEL else []))
    if sentences(())[0] in result.findings:
        p = smallest_attainable_p(n_groups // 2)
        few = f"With {n_groups} groups of examples the smallest attainable p is {p:.2g}, so none can be selected."
        return (UNDECLARED, *([few] if p >= LEVEL else []))
    n_tests = int(result.summary(result.metrics[0].name)["p"].notna().sum())
    p = smallest_attainable_p(n_groups, n_tests)
    few = (
        f"With {n_groups} groups of examples and {n_tests} cells the smallest attainable corrected p is {p:.2g}, "
        "so no cell can be significant."
    )
    return (UNASKED, *([few] if n_tests and p >= LEVEL else []))
