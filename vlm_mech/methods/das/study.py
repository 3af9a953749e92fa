"""How often an interchange in a subspace gives the other picture's answer, beside what random ones and others do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.inputs.span import Span
from vlm_mech.interventions.receipt import Receipt, add_up, summarise
from vlm_mech.interventions.specification import Replace
from vlm_mech.methods.das.data import Parts, interchanges
from vlm_mech.methods.das.training import DasRecipe, Trained, prepared, shuffled, trained
from vlm_mech.results.result import SHARE, Metric
from vlm_mech.sweeps.engine import engine_of
from vlm_mech.sweeps.shares import Bytes

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

TRAINED, RANDOM, SHUFFLED, TWIN, WHOLE = "trained", "random", "shuffled targets", "random weights", "all dimensions"
IIA, LEAD = "iia", "logit_diff"
AXES = ("subspace", "k")
METRICS = (
    Metric(
        IIA,
        SHARE,
        "interchange accuracy: share of interchanges after which the token with the largest logit is the first of the "
        "answer right for the lender's image; baseline: without an edit",
    ),
    Metric(
        LEAD,
        "logits",
        "lead of that answer's first token over that of the prompt's own; baseline: without an edit",
        True,
    ),
)
Numbers = Float[np.ndarray, "edit metric example"]


@dataclass(frozen=True)
class Design:
    """What is trained and compared: where, of how many dimensions, with how many random subspaces and what seeds."""

    site: Site
    span: Span
    ks: tuple[int, ...]
    n_random: int
    recipe: DasRecipe
    batch: int
    seed: int
    engine: str
    budget: Bytes


def fitted(vlm: "VLM", parts: Parts, design: Design, *, with_shuffled: bool) -> dict[str, dict[int, Trained]]:
    """Subspaces of each number of dimensions, trained on the targets and (`with_shuffled`) on shuffled ones."""
    train, validation = (
        [prepared(vlm, each, design.site, design.span) for each in interchanges(vlm, part, design.batch)]
        for part in (parts.train, parts.validation)
    )
    targets = {TRAINED: (train, validation)}
    if with_shuffled:
        targets[SHUFFLED] = (shuffled(train, design.seed), shuffled(validation, design.seed + 1))
    how: dict[str, Any] = {"recipe": design.recipe, "seed": design.seed}
    return {
        name: {k: trained(vlm, *given, design.site, k, **how) for k in design.ks} for name, given in targets.items()
    }


def random_rows(width: int, k: int, seed: int) -> Float[Tensor, "k width"]:
    """Orthonormal rows of a random subspace, all of which are equally likely."""
    drawn = torch.randn(width, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].T.contiguous()


def told_of(
    vlm: "VLM", pairs: Pairs, design: Design, subspaces: Sequence[Tensor | None]
) -> tuple[pd.DataFrame, Numbers, list[Receipt]]:
    """Every interchange of the pairs in every subspace, with verified receipts.

    Args:
        subspaces: rows of each; None for all dimensions, which is a plain `Replace`.

    Returns:
        A row per example with its group and both metrics without an edit; and both metrics under each edit.
    """
    tables, values, receipts = [], [], []
    for each in interchanges(vlm, pairs, design.batch):
        engine = engine_of(vlm, each.encoded, design.engine, budget=design.budget)
        edits = [Replace(design.site, design.span, source=each.source, subspace=rows) for rows in subspaces]

        def scores(logits: Tensor, each: Any = each) -> Tensor:
            rows, read = torch.arange(len(logits), device=logits.device), logits.float()
            wanted, own = each.wanted.to(logits.device), each.own.to(logits.device)
            return torch.stack([(read.argmax(-1) == wanted).float(), read[rows, wanted] - read[rows, own]])

        found, proofs = engine.answers(edits, keep=lambda _, logits, scores=scores: scores(logits[:, 0]))
        before = scores(engine.baseline).double().cpu().numpy()
        table = pd.DataFrame({"example": each.names, "group": each.groups})
        tables.append(table.assign(**{f"{name}_baseline": row for name, row in zip((IIA, LEAD), before, strict=True)}))
        values.append(found.double().cpu().numpy())
        receipts += [receipt for proof in proofs for receipt in proof]
    return pd.concat(tables, ignore_index=True), np.concatenate(values, axis=2), receipts


def rows_of(examples: pd.DataFrame, values: Float[np.ndarray, "metric example"], subspace: str, k: int) -> pd.DataFrame:
    """The rows of one cell of the table."""
    named = dict(zip((IIA, LEAD), values, strict=True))
    return examples.assign(subspace=subspace, k=k, **named)


def study(
    vlm: "VLM", parts: Parts, design: Design, found: dict[str, dict[int, Trained]]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The test part interchanged in each trained subspace, in random ones, and in all dimensions.

    Returns:
        The table, of random subspaces the mean over draws; and the interchange accuracy of each draw by k, and the
        summary of all receipts.
    """
    width = vlm.width(design.site)
    drawn = {k: [random_rows(width, k, design.seed + draw) for draw in range(design.n_random)] for k in design.ks}
    cells = [(WHOLE, width, [None])]
    for name, by_k in found.items():
        cells += [(name, k, [each.rows]) for k, each in by_k.items()]
    cells += [(RANDOM, k, draws) for k, draws in drawn.items()]
    examples, values, receipts = told_of(vlm, parts.test, design, [rows for *_, some in cells for rows in some])
    tables, told, first = [], {}, 0
    for name, k, some in cells:
        own = values[first : first + len(some)]
        tables.append(rows_of(examples, own.mean(0), name, k))
        if name == RANDOM:
            told[str(k)] = own[:, 0].mean(-1).tolist()
        first += len(some)
    return pd.concat(tables, ignore_index=True), {"random_iia": told, "receipts": add_up([summarise(receipts)])}


def of_twin(
    twin: "VLM", parts: Parts, design: Design
) -> tuple[pd.DataFrame, dict[str, dict[int, Trained]], dict[str, float | int]]:
    """The same of a model with shuffled weights, trained anew on the same pairs: table, subspaces and receipts."""
    found = fitted(twin, parts, design, with_shuffled=False)
    subspaces = [each.rows for each in found[TRAINED].values()]
    examples, values, receipts = told_of(twin, parts.test, design, subspaces)
    tables = [rows_of(examples, own, TWIN, k) for own, k in zip(values, design.ks, strict=True)]
    return pd.concat(tables, ignore_index=True), {TWIN: found[TRAINED]}, summarise(receipts)
