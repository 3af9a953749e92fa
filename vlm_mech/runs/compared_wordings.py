"""What the runs of several wordings say together."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_mech.results.result import Result
from vlm_mech.results.wording_figure import wording_dots
from vlm_mech.results.wordings import findings, over_wordings, side_by_side, spread
from vlm_mech.runs.outcome import Outcome

TOGETHER = (
    "The same examples are asked in several wordings. The interval says what other examples would change, the spread "
    "over wordings what other words do."
)


def compared(found: Mapping[str, tuple[Path, Result]], left_out: Mapping[str, str]) -> Outcome:
    """The results of all wordings in one, the table and figure over wordings, and links to the runs of each.

    Args:
        found: by wording the folder of its run, and what it found.
        left_out: by wording why its run could say nothing.

    Raises:
        UsageError: runs that cannot be compared.
    """
    result = side_by_side({wording: each for wording, (_, each) in found.items()}, left_out)
    over = over_wordings(result)
    first = next(iter(found.values()))[1].provenance
    told = {name: _without_wording(first[name]) for name in ("model", "data") if name in first}
    told["question"] = f"{first.get('question', '')} {TOGETHER}".strip()
    told["wordings"] = [
        {
            "wording": wording,
            "folder": folder.name,
            "n": int(each.table["example"].nunique()),
            "refused": len(each.provenance.get("refused", [])),
        }
        for wording, (folder, each) in found.items()
    ]
    if left_out:
        told["left_out"] = [{"wording": wording, "reason": reason} for wording, reason in left_out.items()]
    result = dataclasses.replace(result, provenance=told, findings=findings(result, over))
    links = {
        f"{folder.name}: {wording!r} - {' '.join(each.findings[:1])}": f"{folder.name}/report.html"
        for wording, (folder, each) in found.items()
    }
    tables = {} if over is None else {"wordings": spread(result, over)}
    return Outcome(result, {"wordings": wording_dots(result)}, links=links, tables=tables)


def _without_wording(told: Any) -> Any:
    """What a run says of its data, less how that is put."""
    if isinstance(told, list):
        return [_without_wording(each) for each in told]
    return {name: value for name, value in told.items() if name != "wording"} if isinstance(told, dict) else told
