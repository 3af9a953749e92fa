"""What trained subspaces do on unseen objects, in sentences made from the result's numbers."""

import pandas as pd

from vlm_mech.methods.das.study import IIA, RANDOM, SHUFFLED, TRAINED, TWIN, WHOLE
from vlm_mech.results.result import Result

NOTHING = 0.2
"""Interchange accuracy of all dimensions below which no subspace has anything to find."""


def findings(result: Result) -> tuple[str, ...]:
    """The chosen subspace on the test part, its ceiling and floor, and each control next to it.

    Args:
        result: of `das.train_das`.
    """
    rows = result.summary(IIA).set_index(["subspace", "k"])
    k, counts = result.provenance["chosen_k"], result.provenance["pairs"]
    draws = result.provenance["random_iia"][str(k)]
    own, whole = rows.loc[(TRAINED, k)], rows.xs(WHOLE).iloc[0]
    reached = sum(each >= own["mean"] for each in draws)
    told = [
        f"Trained on {counts['train']} pairs, selected on {counts['validation']}, tested on {counts['test']}, "
        "with disjoint objects.",
        f"Interchange in {_dimensions(k)} (chosen on validation) gives the other image's answer in "
        f"{_share(own)} of {own['n']} cases; in all dimensions in {_share(whole)}, unedited in "
        f"{own['baseline']:.2f}.",
        f"{len(draws)} random subspaces of equal dimension give it in {sum(draws) / len(draws):.2f} on average and "
        f"at most {max(draws):.2f}; {reached} reach the trained one (p = {(1 + reached) / (1 + len(draws)):.3f}).",
    ]
    for name, what in ((SHUFFLED, "trained on shuffled answers"), (TWIN, "trained in a model with shuffled weights")):
        if (name, k) in rows.index:
            apart = result.contrast({"subspace": TRAINED, "k": k}, {"subspace": name, "k": k}, IIA)
            told.append(
                f"A subspace of equal dimension {what} gives it in {_share(rows.loc[(name, k)])}: "
                f"lower by {apart['mean']:.2f} ({apart['ci_low']:.2f} to {apart['ci_high']:.2f})."
            )
    if whole["mean"] < NOTHING:
        told.append(
            "Not even all dimensions give it: at this site the model does not read what distinguishes the images."
        )
    return (*told, _by_k(rows, k))


def _by_k(rows: pd.DataFrame, chosen: int) -> str:
    each = [
        f"{k}: {row['mean']:.2f} (random {rows.loc[(RANDOM, k), 'mean']:.2f})" for k, row in rows.xs(TRAINED).iterrows()
    ]
    return f"By number of dimensions: {', '.join(each)}; {chosen} was chosen on validation pairs, before these numbers."


def _dimensions(k: int) -> str:
    return f"{k} dimension{'s' if k > 1 else ''}"


def _share(row: pd.Series) -> str:
    return f"{row['mean']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f})"
