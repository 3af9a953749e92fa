"""What could be read at every depth: linear probes of the answer at the last token and at the object's patches.

They are fitted on other scenes (or, where there are none, on the other folds of the examples themselves), and read the
very examples that are swapped and cut. Probes of shuffled labels are the control.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from vlm_mech.architectures.site import Site
from vlm_mech.data.derived_pairs import apart
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.methods.probing.controls import shuffled
from vlm_mech.methods.probing.crossfit import crossfit, is_first, stacked_states
from vlm_mech.methods.probing.data import (
    OBJECT,
    PATCH,
    Examples,
    Features,
    Spot,
    changed_patches,
    examples_of,
    probe_sites,
    read_states,
    spots_of,
)
from vlm_mech.methods.probing.descent import LINEAR
from vlm_mech.methods.probing.splits import grouped, make_splits, numbered
from vlm_mech.methods.probing.training import Split, probabilities, train
from vlm_mech.methods.visual_flow.data import Cases
from vlm_mech.methods.visual_flow.study import INPUT, PROBE, SHUFFLED, as_rows
from vlm_mech.sweeps.measures import Comparison

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

READ_AT = (OBJECT, "last")
N_FOLDS, N_SEEDS, DRAWS = 4, 2, 100
HINT = "give more examples, another --probe-data, or --no-probe"


@dataclass(frozen=True, eq=False)
class ProbeExamples:
    """What probes are fitted on: examples with the number of each one's class, and their states; `own` says that they
    are both images of the pairs that are read, `groups` what no split tears apart."""

    examples: Examples
    classes: tuple[str, ...]
    labels: Int[np.ndarray, "example"]
    groups: Int[np.ndarray, "example"]
    features: Features
    own: bool
    seed: int


def check_apart(read: Pairs, fitted_on: Pairs | None) -> None:
    """Raises `UsageError` when a pair that probes are fitted on shows a picture that they are to be read on.

    Args:
        fitted_on: None where they are fitted on the pairs that are read, by folds.
    """
    for pair in apart(fitted_on, read).refused[len(fitted_on.refused) :] if fitted_on else ():
        raise UsageError(f"probes are read on other images than they are fitted on; pair {pair.id}: {pair.reason}")


def places_of(vlm: "VLM", *, every: int = 1) -> tuple[Site, ...]:
    """Where probes read: outputs of tower and projector, what the decoder receives, and outputs of its blocks."""
    return (*probe_sites(vlm, every=every), Site("llm.resid_pre", 0))


def layer_of(site: Site) -> int:
    """The layer of a place in a map."""
    return INPUT if site.name == "llm.resid_pre" else site.layer or 0


def probe_examples(
    vlm: "VLM", cases: Cases, others: Pairs | None, *, folder: Path, every: int = 1, seed: int = 0, batch: int = 32
) -> ProbeExamples:
    """The examples that probes are fitted on, with their states at all places (read once, kept in the folder).

    Args:
        others: pairs of another data set; without them both images of every pair of the map.
        every: read every Nth block.

    Raises:
        UsageError: an answer that too few examples have, one of the map that no example has, or image tokens that are
            learned queries.
    """
    if not vlm.encode(cases.pairs[:1].base).rows[0].images[0].layout.views:
        raise UsageError(
            f"image tokens of {vlm.name} are not patches, so that no probe can read the object's; --no-probe"
        )
    examples = examples_of(vlm, cases.pairs if others is None else others)
    _check_answers(cases, examples)
    classes, labels = numbered(examples.labels)
    # Questions may recur on both sides of a fold: what is asked is whether the answer can be read, not whether a probe
    # carries over to other questions.
    groups = grouped(examples, "scene")
    spots = spots_of(places_of(vlm, every=every), READ_AT)
    states = read_states(vlm, examples.prompts, examples.objects, spots, folder=folder / "fitted", batch=batch)
    return ProbeExamples(examples, classes, labels, groups, states, others is None, seed)


def _check_answers(cases: Cases, examples: Examples) -> None:
    scenes = Counter(label for label, _ in {*zip(examples.labels, examples.groups, strict=True)})
    for label, n in scenes.items():
        if n < N_FOLDS:
            raise UsageError(
                f"answer {label!r} is that of {n} scene(s); a probe needs {N_FOLDS} of each answer: {HINT}"
            )
    missing = sorted({*cases.pairs.answer} - set(examples.labels))
    if missing:
        raise UsageError(f"answer {missing[0]!r} is that of no example in {examples.name}; {HINT}")


def probe_rows(
    vlm: "VLM",
    cases: Cases,
    fitted: ProbeExamples,
    *,
    folder: Path,
    batch: int = 32,
    measure: Comparison = "logit_diff",
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What probes, and probes of shuffled labels, say of the images of a map: its rows, and notes on the fits.

    Args:
        measure: that of the map (see `study.flow`), whose columns the rows have.
    """
    splits = make_splits(fitted.labels, fitted.groups, n_folds=N_FOLDS, n_seeds=N_SEEDS, seed=fitted.seed)
    labels = np.stack([fitted.labels, control_labels(fitted, splits)])
    elsewhere: Features | None = None
    if not fitted.own:
        objects = tuple(changed_patches(vlm, pair) for pair in cases.pairs)
        spots = tuple(fitted.features)
        elsewhere = read_states(vlm, cases.pairs.base, objects, spots, folder=folder / "read", batch=batch)
    options = {"groups": fitted.groups.tolist(), "elsewhere": elsewhere, "device": str(vlm.device)}
    readings = crossfit(fitted.features, labels, splits, LINEAR, **options)
    # Of its own examples every other one is the counterfactual image, which the map does not ask about.
    said = readings.tested.mean(2)[:, :, ::2] if readings.elsewhere is None else readings.elsewhere
    tables = [
        _rows(said[number, variant], spot, method, cases, fitted.classes)
        for number, spot in enumerate(readings.spots)
        for variant, method in enumerate((PROBE, SHUFFLED))
    ]
    notes = {"on": fitted.examples.name, "n": len(fitted.examples), "classes": fitted.classes, "own": fitted.own}
    groups = {pair.id: pair.group or pair.id for pair in cases.pairs}
    table = pd.concat(tables, ignore_index=True)
    return as_rows(table.assign(group=table["example"].map(groups), skipped=""), measure), notes


def control_labels(fitted: ProbeExamples, splits: Sequence[Split]) -> Int[np.ndarray, "example"]:
    """Shuffled labels, drawn until every class is in every training part: folds are stratified by the real ones."""
    for draw in range(DRAWS):
        labels = shuffled(fitted.labels, seed=fitted.seed + draw)
        if all(len(set(labels[split.train])) == len(fitted.classes) for split in splits):
            return labels
    raise UsageError(
        f"{len(fitted.labels)} examples of {len(fitted.classes)} answers are too few to fit probes; {HINT}"
    )


def _rows(
    said: Float[np.ndarray, "example n_classes"], spot: Spot, method: str, cases: Cases, classes: tuple[str, ...]
) -> pd.DataFrame:
    rows = np.arange(len(cases))
    true = np.array([classes.index(answer) for answer in cases.pairs.answer])
    rival = np.array([classes.index(each) if each in classes else -1 for each in cases.rivals])
    numbers = {
        "accuracy": is_first(said, true).astype(float),
        "p_true": said[rows, true].astype(float),
        "p_rival": np.where(rival >= 0, said[rows, rival], np.nan).astype(float),
    }
    baselines = {
        f"{name}_baseline": np.where(np.isnan(held), np.nan, 1 / len(classes)) for name, held in numbers.items()
    }
    where = {"method": method, "span": spot.span, "stream": spot.site.stream, "layer": layer_of(spot.site)}
    return pd.DataFrame({"example": [pair.id for pair in cases.pairs], **where, **numbers, **baselines})


def patch_probabilities(
    vlm: "VLM", cases: Cases, fitted: ProbeExamples, sites: tuple[Site, ...], *, folder: Path
) -> Float[np.ndarray, "example site patch"]:
    """Probability of the answer at every patch of the first images of a map, by probes that saw none of their scenes.

    Probes are fitted on the mean of the object's patches; of several that did not see a scene, the mean is given.

    Args:
        cases: the first examples of those that probes are fitted for.

    Raises:
        UsageError: images cut into unlike grids.
    """
    grids = {vlm.encode(prompt).grids()[0] for prompt in cases.pairs.base}
    if len(grids) > 1:
        raise UsageError(f"images are cut into the grids {sorted(grids)}; maps of patches need the same, or --pages 0")
    n_rows, n_columns = grids.pop()
    names = [f"{PATCH} {row},{column}" for row in range(n_rows) for column in range(n_columns)]
    objects = tuple(changed_patches(vlm, pair) for pair in cases.pairs)
    every = [Spot(site, name) for site in sites for name in names]
    states = read_states(vlm, cases.pairs.base, objects, every, folder=folder / "patches", batch=8)
    patches = [torch.stack([states[Spot(site, name)] for name in names], 1).to(vlm.device) for site in sites]
    numbers = range(len(sites))
    stacked = stacked_states(fitted.features, [Spot(site, OBJECT) for site in sites], numbers, str(vlm.device))
    splits = make_splits(fitted.labels, fitted.groups, n_folds=N_FOLDS, n_seeds=1, seed=fitted.seed)
    labels = torch.from_numpy(fitted.labels)[None].to(vlm.device)
    true = [fitted.classes.index(answer) for answer in cases.pairs.answer]
    found, n_read = np.zeros((len(cases), len(sites), len(names))), np.zeros((len(cases), len(sites), 1))
    for entries, stack in train(stacked, labels, splits, LINEAR, n_classes=len(fitted.classes)):
        for number, label in enumerate(true):
            given = torch.stack([patches[feature][number].float() for feature in entries.features])
            said = probabilities(stack, given)[:, 0, :, label].cpu().numpy()
            for entry, (feature, split) in enumerate(zip(entries.features, entries.splits, strict=True)):
                # Of its own examples, the first images of pairs have the even numbers.
                if not fitted.own or 2 * number in splits[split].test:
                    found[number, feature] += said[entry]
                    n_read[number, feature] += 1
    return found / n_read
