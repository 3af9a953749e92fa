"""One thing asked of a model, whether it holds, and when a model is refused."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_mech.errors import WorkError


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


def refuse_unless_all_hold(name: str, findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings about the model of that name.

    Raises:
        WorkError: something does not hold; the message names it.
    """
    findings = tuple(findings)
    failed = [finding for finding in findings if not finding.holds]
    if failed:
        raise WorkError(f"{name} is refused: " + "; ".join(f"{each.name}: {each.detail}" for each in failed))
    return findings


def find_close(name: str, found: Tensor, expected: Tensor) -> Finding:
    """Whether two tensors are equal but for rounding in the data type of the first."""
    scale = expected.float().abs().max().item()
    error = (found.float() - expected.to(found.device).float()).abs().max().item()
    limit = 16 * torch.finfo(found.dtype).eps * max(1.0, scale)
    return Finding(name, error <= limit, f"largest difference {error:.3g}, allowed {limit:.3g}")
