"""One thing asked of a model."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing asked of the model: whether it holds, and the number that shows it."""

    name: str
    holds: bool
    detail: str


def findings_table(findings: Iterable[Finding]) -> str:
    """One aligned line a finding."""
    findings = tuple(findings)
    width = max((len(finding.name) for finding in findings), default=0)
    return "\n".join(
        f"{'holds ' if finding.holds else 'FAILS '} {finding.name.ljust(width)}  {finding.detail}"
        for finding in findings
    )
