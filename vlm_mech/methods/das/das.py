"""Distributed alignment search as one call: subspaces trained, chosen, and told of on objects that neither saw.

After Geiger et al. (b + R^T (R s - R b) with orthonormal rows R, trained on the counterfactual answer); parts by
objects, validation and the controls are ours. A subspace that is trained always fits something: only beside random
subspaces, shuffled targets and a model of random weights does its accuracy say anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import check_decoder, check_gradients
from vlm_mech.data.pairs import Pairs, check_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Span
from vlm_mech.interventions.receipt import add_up
from vlm_mech.interventions.specification import Replace, Source
from vlm_mech.methods.das.data import Parts, answered, check_site, parts_of
from vlm_mech.methods.das.figures import drawn
from vlm_mech.methods.das.findings import findings
from vlm_mech.methods.das.study import AXES, METRICS, TRAINED, Design, fitted, of_twin, study
from vlm_mech.methods.das.training import DasRecipe, Trained
from vlm_mech.models.twin import twin_of
from vlm_mech.results.figures import drawn_by
from vlm_mech.results.plotted import PLOT, Plotted
from vlm_mech.results.result import Result
from vlm_mech.runs.provenance import about, remarks
from vlm_mech.sweeps.asked import check_whole
from vlm_mech.sweeps.shares import budget_of

if TYPE_CHECKING:
    import torch

    from vlm_mech.models.vlm import VLM

QUESTION = (
    "Do a few directions of the states at one site carry the answer from one image to another? Directions are trained "
    "so that an interchange intervention within them gives the other image's answer. They are tested on unseen "
    "objects, and compared with random directions, directions trained on shuffled answers, and those of a model with "
    "shuffled weights."
)


@dataclass(frozen=True, eq=False)
class SubspaceTraining(Plotted):
    """Subspaces of each number of dimensions, the one that validation chose, and what all of them do on the test part.

    `bases` are orthonormal rows, k x width, in float32 on the CPU. `result` has a row per test interchange and cell of
    `subspace` (trained, random, shuffled targets, random weights, all dimensions) and `k`, with the metrics `iia` and
    `logit_diff`, whose baselines are those without an edit.
    """

    site: Site
    span: Span
    bases: dict[int, "torch.Tensor"]
    chosen: int
    parts: Parts
    result: Result

    def _drawn(self) -> Result:
        return self.result

    @property
    def basis(self) -> "torch.Tensor":
        """The rows of the chosen subspace, k x width."""
        return self.bases[self.chosen]

    @property
    def findings(self) -> tuple[str, ...]:
        """What the result says."""
        return self.result.findings

    def replace(self, source: Source, k: int | None = None) -> Replace:
        """The interchange with the states of a source in the trained subspace.

        Args:
            source: as for `Replace`.
            k: dimensions of the subspace; those that validation chose unless given.

        Raises:
            UsageError: none of so many dimensions was trained.
        """
        asked = self.chosen if k is None else k
        if asked not in self.bases:
            raise UsageError(f"no subspace of {asked!r} dimensions was trained; of {', '.join(map(str, self.bases))}")
        return Replace(self.site, self.span, source=source, subspace=self.bases[asked])


def train_das(
    vlm: "VLM",
    pairs: Pairs,
    site: Site,
    span: Span,
    *,
    k: int | Sequence[int] = (1, 4, 16),
    objects: Sequence[str] | None = None,
    only_correct: bool = True,
    n_random: int = 20,
    twin: bool = True,
    recipe: DasRecipe | None = None,
    batch: int = 16,
    seed: int = 0,
    engine: str = "fast",
    memory: int | str | None = None,
) -> SubspaceTraining:
    """Subspaces of a site's states in which an interchange gives the answer to the other picture, with their controls.

    Each picture of a pair is run with the states of the other one's run, within k trained directions alone. Training
    stops by the validation part, which also chooses k (the largest interchange accuracy, of equal ones the smallest);
    everything told is of the test part. No object is in two parts. Pairs that do not fit the model, or are answered
    wrongly, are listed under `refused` in the provenance.

    Args:
        site: one site of the decoder, such as `Site("llm.resid_post", 5)`.
        span: the tokens whose states are interchanged; as many in both pictures.
        k: dimensions, one number or several.
        objects: for each pair what no two parts may share, such as the thing asked about; its question unless given.
        only_correct: leave out pairs one of whose pictures the model answers wrongly.
        n_random: random subspaces of each k, at least 20.
        twin: also train on a model with shuffled weights (`random weights`), which needs room for a second model.
        recipe: optimiser, steps and when to stop; `DasRecipe()` by default.
        batch: prompts a pass; the decoder's embeddings of all training prompts are held in memory.
        seed: draws the parts, rotations, orders, random subspaces and shuffles.
        engine: `fast`, or `trace` for one whole forward pass an edit, by which the test part is interchanged.
        memory: bytes that may take beyond the model, such as "2GiB".

    Returns:
        The subspaces, with a result that `findings` puts in words.

    Raises:
        UsageError: a site before the decoder, a span with no tokens, unlike numbers of them, k beyond the width, too
            few objects for three parts, or no pair that is answered correctly.
    """
    check_decoder(vlm, "train_das")
    check_gradients("train_das")
    check_pairs(pairs, "train_das")
    check_site(vlm, site)
    ks = _dimensions(vlm, site, k)
    check_whole(n_random=(n_random, 20), batch=(batch, 1), seed=(seed, 0))
    labels = [pair.question for pair in pairs] if objects is None else list(objects)
    if len(labels) != len(pairs):
        raise UsageError(f"{len(labels)} objects are given for {len(pairs)} pairs; one each is needed")
    of = dict(zip((pair.id for pair in pairs), labels, strict=True))
    used = answered(vlm, pairs, only_correct=only_correct, batch=batch)
    parts = parts_of(used, [of[pair.id] for pair in used], seed=seed)
    design = Design(site, span, ks, n_random, recipe or DasRecipe(), batch, seed, engine, budget_of(vlm, memory))
    found = fitted(vlm, parts, design, with_shuffled=True)
    table, told = study(vlm, parts, design, found)
    if twin:
        more, others, proofs = of_twin(twin_of(vlm, seed), parts, design)
        table, found = pd.concat([table, more], ignore_index=True), found | others
        told["receipts"] = add_up([told["receipts"], proofs])
    chosen = max(ks, key=lambda each: (found[TRAINED][each].validation_iia, -each))
    provenance = about(QUESTION, vlm, used, told.pop("receipts")) | told | {PLOT: drawn_by(drawn)}
    provenance |= {"chosen_k": chosen, "pairs": parts.counts, "training": _notes(found)}
    config = {"site": str(site), "span": str(span), "k": list(ks), "n_random": n_random, "seed": seed}
    result = Result("das", table, AXES, METRICS, config, provenance)
    result = Result("das", table, AXES, METRICS, config, provenance, (*findings(result), *remarks(provenance)))
    return SubspaceTraining(site, span, {k: found[TRAINED][k].rows for k in ks}, chosen, parts, result)


def _dimensions(vlm: "VLM", site: Site, k: Any) -> tuple[int, ...]:
    ks = tuple(k) if isinstance(k, list | tuple | range) else (k,)
    width = vlm.width(site)
    for each in ks:
        if isinstance(each, bool) or not isinstance(each, int) or not 1 <= each <= width:
            raise UsageError(f"k is {each!r}; a number of dimensions from 1 to {width} is needed at {site}")
    if len(set(ks)) != len(ks) or not ks:
        raise UsageError(f"k is {k!r}; numbers of dimensions are needed, each once")
    return ks


def _notes(found: dict[str, dict[int, Trained]]) -> list[dict[str, Any]]:
    """How each subspace was trained, as JSON has it."""
    return [
        {
            "subspace": name,
            "k": k,
            "n_steps": each.n_steps,
            "validation_losses": list(each.losses),
            "train_iia": each.train_iia,
            "validation_iia": each.validation_iia,
        }
        for name, by_k in found.items()
        for k, each in by_k.items()
    ]
