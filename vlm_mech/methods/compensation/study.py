"""How well the parts of an object are named at their patches when attention is cut, and whether the answer suffers.

Object part identification after Takishita et al. (2025, arXiv 2506.05439): the best rank of the part's label over the
patches of its mask, read with the logit lens, here at what the decoder receives and after each of its blocks. What they
cut, where they read and how they averaged could not be found; see docs/methods.md.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlm_mech.architectures.site import Site, sites
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import OneImage
from vlm_mech.interventions.specification import Intervention
from vlm_mech.interventions.trace import read
from vlm_mech.methods.compensation.data import Example, Examples
from vlm_mech.methods.compensation.variants import ALL, NONE, Layers, Variant, edit_of
from vlm_mech.methods.lens.data import labels_apart
from vlm_mech.methods.lens.identifiability import HITS, MaskedPart, identifiability
from vlm_mech.methods.lens.logit_lens import Lens, lens_of
from vlm_mech.models.readout import Readout
from vlm_mech.results import metrics
from vlm_mech.results.metrics import AnswerLogits
from vlm_mech.results.result import N_RESAMPLES, Metric, Result
from vlm_mech.results.statistics import Estimate, bootstrap_means, estimate
from vlm_mech.sweeps.measures import Comparison, Measure, comparison, logit_diff, said
from vlm_mech.sweeps.sweep import Point, plan_sweep, sweep

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

ANSWER = "answer"
"""The value of the axis `site` for the model's own answer, read at the last token of the prompt."""
AXES = ("layers", "variant", "site")
N_DRAWS = 50
"""Sets of random patches that each best rank is compared with."""

RECIPROCAL = Metric(
    "reciprocal_rank",
    "share",
    "one over the best rank of the part's word at its patches, or over that of the answer: of its tokens the worst",
)
LOGIT_DIFF = Metric(
    "logit_diff", "logits", "logit of the part's word minus that of another part, each at its best patch", signed=True
)
METRICS = (
    RECIPROCAL,
    LOGIT_DIFF,
    *(Metric(f"hit@{k}", "share", f"whether that best rank is at most {k}") for k in HITS),
    Metric("log2_rank", "bits", "binary logarithm of that best rank; 0 is the best"),
    Metric("random_patches", "share", "reciprocal rank at as many random patches outside the part, mean over draws"),
    Metric("other_label", "share", "reciprocal rank of another part's word at the same patches, or as the answer"),
    Metric("background", "share", "reciprocal rank of the part's word at as many patches of the background"),
)
"""What is measured; each with its value in the unedited run as baseline."""


def metrics_of(name: Comparison = "logit_diff") -> tuple[Metric, ...]:
    """The metrics of a run whose answers are compared so; parts are compared by the logits of their words alone."""
    compared = comparison(name, (), ()).metric
    told = f"{compared.description}; of parts there is none"
    return METRICS if name == LOGIT_DIFF.name else (*METRICS, dataclasses.replace(compared, description=told))


def difference_of(result: Result) -> Comparison:
    """How the answers of a run were compared."""
    names = {metric.name for metric in result.metrics}
    return next(name for name in reversed(get_args(Comparison)) if name in names)


CONTROLS = ("random_patches", "background", "other_label")
"""Metrics that the unedited run's naming of parts is held against."""


@dataclass(frozen=True)
class Cell:
    """A variant over a range of layers."""

    variant: Variant
    range: str
    layers: Layers

    @property
    def point(self) -> Point:
        """Its place on the axes."""
        return Point((("layers", self.range), ("variant", self.variant.name)))


def cells_of(variants: Iterable[Variant], ranges: dict[str, Layers]) -> tuple[Cell, ...]:
    """Every variant over every range; controls at background patches over the first range alone."""
    first = next(iter(ranges))
    return tuple(
        Cell(variant, name, layers)
        for name, layers in ranges.items()
        for variant in variants
        if not variant.background or name == first
    )


def read_sites(vlm: "VLM", encoded: Encoded) -> tuple[Site, ...]:
    """Where parts are read: the projector's output, or what the decoder receives where tokens mix it; every block."""
    given = [view.given for picture in encoded.rows[0].images for view in picture.layout.views]
    first = Site("projector.out") if all((each >= 0).all() for each in given) else Site("llm.resid_pre", 0)
    return (first, *sites("llm.resid_post", vlm.llm_layers))


def measure(
    vlm: "VLM",
    batch: Sequence[Example],
    cells: Sequence[Cell],
    readout: Readout,
    *,
    compared: Comparison = "logit_diff",
    seed: int = 0,
    engine: str = "fast",
    memory: int | str | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Part identification at every site, and the answer, in the unedited run and in every cell.

    Args:
        batch: examples of equally many tokens.
        readout: from states to scores of the vocabulary, such as `VLM.readout` (the logit lens).
        compared: how the two answers of an example are compared (see `measures.comparison`); the words of parts always
            by their logits.
        seed: draws the random patches; the draws of an example are the same in every cell.
        engine, memory: of the sweep behind the answers.

    Returns:
        The table with a row per example, cell and site, `metrics_of` and baselines in columns, and the summary of the
        receipts of the sweep.

    Raises:
        UsageError: prompts of unequal length, or a variant that does not fit.
        ReceiptError: a knockout did not take effect.
    """
    encoded = vlm.encode([example.prompt for example in batch])
    # The unedited run is over all layers as much as over none.
    unedited = {"layers": next((cell.range for cell in cells), ALL), "variant": NONE.name}
    tables = [identified(vlm, encoded, batch, readout, None, seed=seed).assign(**unedited)]
    edits: dict[Point, Intervention] = {}
    for cell in cells:
        edits[cell.point] = edit_of(encoded, [example.places for example in batch], cell.variant, cell.layers)
        table = identified(vlm, encoded, batch, readout, edits[cell.point], seed=seed)
        tables.append(table.assign(**dict(cell.point.axes)))
    answered, receipts = _answers(vlm, batch, edits, unedited, compared, {"engine": engine, "memory": memory})
    table = _with_baselines(pd.concat([*tables, answered], ignore_index=True), metrics_of(compared))
    groups = {example.pair.id: example.pair.group or example.pair.id for example in batch}
    return table.assign(group=table["example"].map(groups)), receipts


def identified(
    vlm: "VLM",
    encoded: Encoded,
    batch: Sequence[Example],
    readout: Readout,
    intervention: Intervention | None,
    *,
    seed: int,
) -> pd.DataFrame:
    """Part identification in one run: a row per example and site with all `METRICS`."""
    states = read(vlm, encoded, read_sites(vlm, encoded), intervention)
    named = [labels_apart(vlm, each.pair.answer, each.pair.counterfactual_answer) for each in batch]
    labels = {label.word: label for both in named for label in both}
    found = lens_of(vlm, states, OneImage(0, 0), readout, [labels[word] for word in sorted(labels)])
    own = [
        MaskedPart(number, label.word, each.places.part)
        for number, (each, (label, _)) in enumerate(zip(batch, named, strict=True))
    ]
    others = [MaskedPart(part.example, label.word, part.cells) for part, (_, label) in zip(own, named, strict=True)]
    far = [MaskedPart(part.example, part.word, each.places.background) for part, each in zip(own, batch, strict=True)]
    scores = identifiability(found, own, n_draws=N_DRAWS, seed=seed).table
    beside = [identifiability(found, parts, n_draws=1).table["reciprocal_rank"] for parts in (others, far)]
    kept = ["site", "word", "reciprocal_rank", *(f"hit@{k}" for k in HITS), "log2_rank", "whole", "n_patches"]
    difference = [_best_logits(found, one) - _best_logits(found, other) for one, other in zip(own, others, strict=True)]
    return scores[kept].assign(
        word=[batch[int(number)].pair.answer for number in scores["example"]],
        example=[batch[int(number)].pair.id for number in scores["example"]],
        random_patches=scores["reciprocal_rank_baseline"],
        other_label=beside[0],
        background=beside[1],
        logit_diff=np.concatenate(difference),
    )


def _best_logits(found: Lens, part: MaskedPart) -> Float[np.ndarray, "site"]:
    """The word's logit at the part's best patch."""
    places = [
        place
        for place, token in enumerate(found.tokens)
        if token.example == part.example and (token.row, token.column) in part.cells
    ]
    return found.logits[:, places, found.word(part.word)].amax(1).double().numpy()


# The answer


def _answers(
    vlm: "VLM",
    batch: Sequence[Example],
    edits: dict[Point, Intervention],
    unedited: dict[str, str],
    compared: Comparison,
    options: dict[str, Any],
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What becomes of the model's own answer: a row per example and cell, those of the unedited run included."""
    pairs = _asked(batch)
    measures = _measures(pairs, compared)
    found = sweep(vlm, pairs, tuple(edits), lambda point: edits[point], measures, batch=len(pairs), **options)
    names = [each.metric.name for each in measures]
    first = found.table.drop_duplicates("example")
    clean = pd.DataFrame({name: first[f"{name}_baseline"].to_numpy() for name in names})
    clean = clean.assign(example=first["example"].to_numpy(), **unedited)
    table = pd.concat([clean, found.table[["example", "layers", "variant", *names]]], ignore_index=True)
    about = {example.pair.id: example for example in batch}
    # An answer is read at no patch.
    return table.assign(
        site=ANSWER,
        word=[about[name].pair.answer for name in table["example"]],
        random_patches=np.nan,
        background=np.nan,
    ), found.provenance["receipts"]


def _asked(batch: Sequence[Example]) -> Pairs:
    """The pairs of some examples, with their answers spelt as they were found to be."""
    some = tuple(example.pair for example in batch)
    return Pairs("parts", some, spelling=batch[0].spelling, variants=batch[0].variants)


def _measures(pairs: Pairs, compared: Comparison) -> tuple[Measure, ...]:
    own, other = pairs.answer, pairs.counterfactual_answer
    by_name = {metric.name: metric for metric in METRICS}
    hits = [_of_rank(by_name[f"hit@{k}"], lambda rank, k=k: (rank <= k).float(), own) for k in HITS]
    return (
        _of_rank(RECIPROCAL, _reciprocal, own),
        logit_diff(own, other),
        *hits,
        _of_rank(by_name["log2_rank"], lambda rank: torch.log2(rank.double()), own),
        _of_rank(by_name["other_label"], _reciprocal, other),
        *([] if compared == LOGIT_DIFF.name else [comparison(compared, own, other)]),
    )


def _of_rank(metric: Metric, of: Callable[[Int[Tensor, "batch"]], Tensor], answer: Sequence[str]) -> Measure:
    """A number of the rank of a whole answer: of several spellings the best one's, of its tokens the worst."""
    every = said(answer)
    return dataclasses.replace(
        every, metric=metric, of=lambda *answers: of(torch.stack([_worst_rank(each) for each in answers]).amin(0))
    )


def _worst_rank(answer: AnswerLogits) -> Int[Tensor, "batch"]:
    """The worst rank of an answer's tokens, each after those before it: 1 where greedy decoding gives the answer."""
    ids = answer.ids.clamp(min=0)
    ranks = [metrics.rank(answer.logits[:, at], ids[:, at]) for at in range(ids.shape[1])]
    return torch.stack(ranks, 1).where(answer.present, 1).amax(1)


def _reciprocal(rank: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    return 1 / rank


def _with_baselines(table: pd.DataFrame, metrics: Sequence[Metric]) -> pd.DataFrame:
    """Beside every number that of the same example and site in the unedited run."""
    names = [metric.name for metric in metrics]
    clean = table[table["variant"] == NONE.name].set_index(["example", "site"])[names]
    places = pd.MultiIndex.from_frame(table[["example", "site"]])
    return table.assign(**{f"{name}_baseline": clean[name].reindex(places).to_numpy() for name in names})


def plan_answers(
    vlm: "VLM",
    examples: Examples,
    cells: Sequence[Cell],
    *,
    compared: Comparison = "logit_diff",
    batch: int,
    memory: int | str | None = None,
) -> str:
    """What the sweep behind the answers will need, in words; the parts are read in whole passes next to it.

    Raises:
        TooLargeError: a single cell of a single example does not fit into the memory.
    """
    batches = examples.batches(batch)
    some = max(batches, key=len)
    encoded = vlm.encode([example.prompt for example in some])
    places = [example.places for example in some]
    edits = {cell.point: edit_of(encoded, places, cell.variant, cell.layers) for cell in cells}
    pairs, how = _asked(some), {"batch": len(some), "memory": memory}
    planned = plan_sweep(vlm, pairs, tuple(edits), lambda point: edits[point], _measures(pairs, compared), **how)
    n_passes = len(batches) * (1 + len(cells))
    return f"{planned.over(len(examples.examples))}\nin addition, {n_passes} whole passes of {len(some)} read the parts"


# Where it is read


def best_site(vlm: "VLM", examples: Examples, readout: Readout, *, batch: int, seed: int = 0) -> str:
    """The site at which the unedited run names parts best by mean reciprocal rank, the earliest among equals.

    To be found on other examples than those that are reported.
    """
    tables = []
    for some in examples.batches(batch):
        encoded = vlm.encode([example.prompt for example in some])
        tables.append(identified(vlm, encoded, some, readout, None, seed=seed))
    means = pd.concat(tables).groupby("site", sort=False)[RECIPROCAL.name].mean()
    return str(means.idxmax())


def check_site(vlm: "VLM", examples: Examples, site: str) -> str:
    """The site, if parts are read there.

    Raises:
        UsageError: they are not.
    """
    known = [str(each) for each in read_sites(vlm, vlm.encode([examples.examples[0].prompt]))]
    if site not in known:
        raise UsageError(f"site {site!r} is not read; one of {', '.join(known)} is")
    return site


# What it is held against


def differences(result: Result, site: str) -> dict[str, Estimate]:
    """Reciprocal rank of the parts minus that of each control in the unedited run at a site, paired by example."""
    cells = result.cells
    column = cells[(cells["variant"] == NONE.name) & (cells["site"] == site)].index[0]
    found = {}
    for control in CONTROLS:
        values = (result.matrix(RECIPROCAL.name) - result.matrix(control))[:, [column]]
        draws = bootstrap_means(values, result.groups(), n_resamples=N_RESAMPLES, seed=0)
        n_groups = len(np.unique(result.groups()))
        found[control] = estimate(float(values.mean()), draws[:, 0], n_groups=n_groups)
    return found
