"""Do the words of a lens name what a patch shows? An offline score on generated scenes, where that is known.

Ours, in the place of LatentLens' judge (a language model that sees the picture): a patch is named where one of the best
words is the kind or the colour of what covers most of it. Chance is counted, not assumed: the same words judged against
patches of other things in the picture, and of other pictures.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import check_decoder
from vlm_mech.data.render import masks, render
from vlm_mech.data.scene_sampling import sample_scenes
from vlm_mech.data.scenes import Scene, Split
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import Box
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.methods.lens.context_bank import ContextBank, check_bank
from vlm_mech.methods.lens.context_lens import ContextWords, context_words
from vlm_mech.methods.lens.data import unnamed
from vlm_mech.methods.lens.leads import INPUT, depth_sites
from vlm_mech.methods.lens.logit_lens import Lens, lens
from vlm_mech.methods.lens.tuned_lens import LensTraining, TunedLens, train_tuned_lens
from vlm_mech.results.result import SHARE, Metric, Result

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

LOGIT, TUNED, CONTEXTUAL = "logit lens", "tuned lens", "contextual lens"
PATCHES, PICTURES = "other patches", "other pictures"
FLOORS = {PATCHES: "patches of other things in the picture", PICTURES: "patches of other pictures"}
ASKED = "what is in the picture?"
AXES = ("lens", "layer", "floor")
_FLOOR = "baseline: the words of the floor's patches"
METRICS = tuple(
    Metric(name, SHARE, f"share of patches of which one of the best words is {what}; {_FLOOR}", against="floor")
    for name, what in (("named", "the kind or colour shown"), ("kind", "the kind"), ("colour", "the colour"))
)


@dataclass(frozen=True)
class Shown:
    """What a patch shows: number of the thing in its scene, and the words for its kind (or part) and its colour."""

    thing: int
    kinds: frozenset[str]
    colours: frozenset[str]


def named_patches(
    vlm: "VLM",
    *,
    bank: ContextBank | None = None,
    tuned: TunedLens | None = None,
    n: int = 48,
    top: int = 5,
    min_share: float = 0.05,
    split: Split = "test",
    batch: int = 16,
    seed: int = 0,
) -> Result:
    """How often the best words of each lens name what a patch shows, by layer, beside two floors.

    Scenes of two and three things are drawn, half of those with a usual colour in another one. Counted are patches of
    which a thing covers `min_share`; a patch of several shows what covers most. A word counts in any case and with an
    s; other words for the same (`scarlet`) do not.

    Args:
        bank: for the contextual lens; without it that is left out.
        tuned: for the tuned lens, trained on none of these pictures; without it that is left out.
        n: scenes.
        top: words of a patch that count.
        min_share: share of its pixels from which on a patch shows a thing.
        split: of the generated scenes.
        batch: scenes a forward pass.
        seed: draws the scenes.

    Returns:
        A row per scene, `lens`, `layer` (-1: the decoder's input) and `floor`. Metrics, shares of the scene's patches:
        those named by kind or colour, by kind, and by colour. The baseline is the mean over the floor's patches: their
        words judged against what this patch shows (`other patches`: of other things in the picture; `other pictures`).

    Raises:
        UsageError: image tokens that are no patches, a bank or tuned lens of another model, or numbers below 1 (of
            scenes: 2).
    """
    check_decoder(vlm, "named_patches")
    if bank is not None:
        check_bank(bank, "named_patches")
        bank.check(vlm)
    if n < 2 or top < 1 or batch < 1 or not 0 < min_share <= 1:
        raise UsageError(f"n {n}, top {top}, batch {batch}, min_share {min_share}: 2, 1, 1 and up to 1 are possible")
    scenes, shown = _scenes(vlm, n, split, seed, min_share)
    prompts = [Prompt(ASKED, render(scene)) for scene in scenes]
    sites = depth_sites(vlm)
    readings: dict[str, Lens | ContextWords] = {LOGIT: lens(vlm, prompts, sites, "image", top=top, batch_size=batch)}
    if tuned is not None:
        readings[TUNED] = lens(vlm, prompts, sites, "image", top=top, tuned=tuned, batch_size=batch)
    if bank is not None:
        readings[CONTEXTUAL] = context_words(vlm, prompts, bank, top=top, batch_size=batch)
    tables = [_rows(reading, site, name, scenes, shown) for name, reading in readings.items() for site in reading.sites]
    about: dict[str, Any] = {"model": unnamed(vlm), "n": n, "split": split, "seed": seed}
    config = {"top": top, "min_share": min_share, "bank": None if bank is None else bank.record["texts"]}
    return Result("named patches", pd.concat(tables, ignore_index=True), AXES, METRICS, config, about)


def tuned_on_scenes(vlm: "VLM", *, n: int = 64, seed: int = 0, training: LensTraining | None = None) -> TunedLens:
    """A tuned lens of the image tokens of generated scenes: `n` of the training split, a quarter as many to stop by.

    Args:
        n: scenes that translators are trained on.
        seed: draws the scenes.
        training: see `train_tuned_lens`.

    Raises:
        UsageError: fewer than four scenes.
    """
    if n < 4:
        raise UsageError(f"n is {n}; four scenes at least are needed")
    found = list(sample_scenes(n + n // 4, seed=seed, split="train", conflict=0.5))
    prompts = [Prompt(ASKED, render(scene)) for scene in found]
    return train_tuned_lens(vlm, prompts[:n], prompts[n:], depth_sites(vlm)[:-1], "image", training=training)


# What is shown


def _scenes(
    vlm: "VLM", n: int, split: Split, seed: int, min_share: float
) -> tuple[list[Scene], dict[tuple[int, ...], Shown]]:
    """Scenes in which two things at least cover a patch, and what each patch (example, view, row, column) shows."""
    scenes: list[Scene] = []
    found: dict[tuple[int, ...], Shown] = {}
    for scene in sample_scenes(8 * n, seed=seed, split=split, families=("few", "occlusion"), conflict=0.5):
        encoded = vlm.encode(Prompt(ASKED, render(scene)))
        here: dict[tuple[int, ...], Shown] = {}
        for view, (_, n_columns) in enumerate(encoded.grids()):
            what = what_is_shown(scene, encoded.boxes(view=view), min_share)
            here |= {
                (len(scenes), view, *divmod(at, n_columns)): each for at, each in enumerate(what) if each is not None
            }
        if len({each.thing for each in here.values()}) > 1:
            scenes.append(scene)
            found |= here
        if len(scenes) == n:
            return scenes, found
    raise UsageError(
        f"{len(scenes)} of {8 * n} scenes have two things that cover {min_share} of a patch; {n} are needed"
    )


def what_is_shown(scene: Scene, boxes: Sequence[Box], min_share: float) -> list[Shown | None]:
    """What covers most of each box of pixels, None where nothing covers the least share of it."""
    parts = list(masks(scene).items())
    found: list[Shown | None] = []
    for box in boxes:
        top, bottom = round(box.top), max(round(box.top) + 1, round(box.bottom))
        left, right = round(box.left), max(round(box.left) + 1, round(box.right))
        shares = [np.nan_to_num(mask[max(0, top) : bottom, max(0, left) : right].mean()) for _, mask in parts]
        best = int(np.argmax(shares))
        found.append(_shown(scene, *parts[best][0]) if shares[best] >= min_share else None)
    return found


def _shown(scene: Scene, number: int, part: str) -> Shown:
    thing = scene.things[number]
    kinds = {thing.kind, part, *([thing.species] if thing.species else [])}
    return Shown(number, frozenset(kinds), frozenset({thing.colours[thing.parts.index(part)]}))


# Scores


def _rows(
    reading: Lens | ContextWords, site: Site, name: str, scenes: Sequence[Scene], shown: dict[tuple[int, ...], Shown]
) -> pd.DataFrame:
    """A row per scene and floor."""
    words = reading.top_words(site)
    held = [
        (token.example, shown[key], {_plain(word) for word in words[at]})
        for at, token in enumerate(reading.tokens)
        if (key := (token.example, token.view, token.row, token.column)) in shown
    ]
    pictures = np.array([example for example, _, _ in held])
    things = np.array([each.thing for _, each, _ in held])
    same = pictures[:, None] == pictures
    floors = {PATCHES: same & (things[:, None] != things), PICTURES: ~same}
    of: dict[str, Callable[[Shown], frozenset[str]]] = {
        "named": lambda each: each.kinds | each.colours,
        "kind": lambda each: each.kinds,
        "colour": lambda each: each.colours,
    }
    hits = {
        metric: _hits([take(each) for _, each, _ in held], [said for _, _, said in held]) for metric, take in of.items()
    }
    layer = INPUT if site.name == "llm.resid_pre" else site.layer
    rows = []
    for example, scene in enumerate(scenes):
        own = pictures == example
        for floor, others in floors.items():
            row: dict[str, Any] = {"example": scene.key[:12], "lens": name, "layer": layer, "floor": floor}
            for metric, hit in hits.items():
                row[metric] = float(np.diag(hit)[own].mean())
                row[f"{metric}_baseline"] = float(_means(hit[own], others[own]).mean())
            rows.append(row)
    return pd.DataFrame(rows)


def _means(
    hit: Bool[np.ndarray, "patch lender"], others: Bool[np.ndarray, "patch lender"]
) -> Float[np.ndarray, " patch"]:
    """For each patch the mean over those whose words are lent to it."""
    return (hit & others).sum(1) / others.sum(1)


def _hits(truths: Sequence[frozenset[str]], said: Sequence[set[str]]) -> Bool[np.ndarray, "patch lender"]:
    """Whether the words of each lender name what each patch shows."""
    vocabulary = {word: number for number, word in enumerate(sorted(frozenset().union(*truths)))}
    true, spoken = (np.zeros((len(truths), len(vocabulary)), np.float32) for _ in range(2))
    for at, (truth, words) in enumerate(zip(truths, said, strict=True)):
        true[at, [vocabulary[word] for word in truth]] = 1
        spoken[at, [number for word, number in vocabulary.items() if word in words or f"{word}s" in words]] = 1
    return true @ spoken.T > 0


def _plain(word: str) -> str:
    return re.sub(r"[\W_]+", "", word).lower()
