"""Where the numbers of a run come from: what is asked, of which model and data, what was left out, which code ran.

Light to import: `--help` must not wait for torch.
"""

import contextlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_mech.runs.configuration import RunConfig
from vlm_mech.runs.outcome import Outcome

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs

REASONS = 3
"""How many of the examples that could not be used are told with the findings."""


def about(question: str, vlm: Any, pairs: "Pairs", receipts: dict[str, Any]) -> dict[str, Any]:
    """What the provenance of a run over pairs says: what is asked, of which model and data, and what was proved.

    Where the checkpoint ships settings of generation that no answer was generated with, these are named.

    Args:
        question: what is asked, with the words of `data.nouns.Nouns.put`.
    """
    from vlm_mech.data.nouns import nouns_of
    from vlm_mech.runs.answers import about_answers

    # Contrastive models generate nothing.
    aside = getattr(vlm, "settings_set_aside", {})
    return {
        "question": nouns_of(pairs).put(question),
        "model": vlm.identity(),
        # Whether it was remembered depends on the runs before, and is no part of what a run is.
        "check": vlm.checked and {name: told for name, told in vlm.checked.items() if name != "remembered"},
        "data": pairs.described,
        "refused": [{"id": refused.id, "reason": refused.reason} for refused in pairs.refused],
        "receipts": receipts,
        "answers": about_answers(vlm, pairs),
    } | ({"generation": {"settings": "neutral", "set_aside": aside}} if aside else {})


def remarks(provenance: dict[str, Any]) -> tuple[str, ...]:
    """How answers were spelt, which examples were left out, what is to be told of the data: what ends the findings."""
    data = provenance.get("data", {})
    every = data if isinstance(data, list) else [data]
    notes = [note for each in every if isinstance(each, dict) for note in remarks_on(each)]
    return (*spelt(provenance), *left_out(provenance), *notes)


def spelt(provenance: dict[str, Any]) -> tuple[str, ...]:
    """In which spelling answers were compared, where the model had several to choose from, and their tokens."""
    from vlm_mech.runs.answers import told

    return told(provenance.get("answers", {}))


def left_out(provenance: dict[str, Any]) -> tuple[str, ...]:
    """How many examples could not be used, with the first reasons; nothing where all could."""
    refused = provenance.get("refused", [])
    if not refused:
        return ()
    from vlm_mech.data.user_files import with_reason

    reasons = [with_reason(each["id"], each["reason"]) for each in refused[:REASONS]]
    rest = [f"{len(refused) - REASONS} more in provenance.json"] if len(refused) > REASONS else []
    count = f"{len(refused)} example{'s' if len(refused) > 1 else ''}"
    return (f"{count} could not be used: {'; '.join([*reasons, *rest])}.",)


def remarks_on(data: dict[str, Any]) -> tuple[str, ...]:
    """What is to be told of the data, such as known label errors."""
    return tuple(f"{data.get('name')}: {note}." for note in data.get("notes", ()))


def provenance_of(outcome: Outcome, config: RunConfig, seconds: float) -> dict[str, Any]:
    """What a result says of where it comes from, with versions, commit, options and time of its run."""
    return (
        plotted(outcome)
        | outcome.result.provenance
        | {
            "versions": versions(),
            "commit": commit(),
            "seed": config.seed,
            "device": config.device,
            "dtype": config.dtype,
            "attention": config.attn,
            "seconds": round(seconds, 2),
            "resumed": config.resume,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "figures": list(outcome.figures),
            "tables": list(outcome.tables),
        }
    )


def plotted(outcome: Outcome) -> dict[str, Any]:
    """How the figure that answers is drawn again, for `Result.plot`, where the method does not say it itself."""
    from vlm_mech.results.plotted import PLOT

    if not outcome.figures:
        return {}
    from plotly.io.json import to_json_plotly

    # As the figure's own file has it.
    meta = outcome.figures[outcome.answer or next(iter(outcome.figures))].layout.meta
    return {PLOT: json.loads(to_json_plotly(meta))} if meta else {}


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("vlm_mech", "torch", "transformers", "nnsight", "numpy", "pandas", "plotly"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> str | None:
    """The commit of the checkout that this code is in; None for an installed package."""
    return _commit(Path(__file__).parents[2])


def _commit(root: Path) -> str | None:
    """The checked-out commit, marked when files differ from it; None for an installed package."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or None
