"""Pictures of objects with parts: which patches show the part that is asked about, its object, and background.

Generated scenes carry their parts' pixels, as do PACO and Pascal-Part. A folder of the user's own gives for each line
of `pairs.jsonl` or `items.jsonl` also `part_mask` and `object_mask`: pictures of the image's size, white (255; or 1, in
a mask of 0 and 1) where it shows the part that `answer` names or the object.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from vlm_mech.data.counterfactual_scenes import sample_pairs
from vlm_mech.data.derived_pairs import by_groups, checked
from vlm_mech.data.examples import as_pairs
from vlm_mech.data.fitting import Variety, fitting
from vlm_mech.data.item_folder import items_of
from vlm_mech.data.items import Items
from vlm_mech.data.masks import pixels_of
from vlm_mech.data.nouns import nouns_of
from vlm_mech.data.pair_folder import pair_fields
from vlm_mech.data.pairs import Pair, Pairs, Refused, load_pairs
from vlm_mech.data.readers.format import ReaderOptions
from vlm_mech.data.render import masks
from vlm_mech.data.sources import Found, find_data
from vlm_mech.errors import UsageError
from vlm_mech.inputs.answer import Spelling
from vlm_mech.inputs.image import Box
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.inputs.span import Patches
from vlm_mech.inputs.wording import BARE, Wording
from vlm_mech.methods.compensation.variants import Patch, Places
from vlm_mech.methods.lens.data import labels_apart
from vlm_mech.methods.lens.identifiability import patches_of_mask
from vlm_mech.runs.answers import about_answers

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

SOME = 32
"""Scenes by default."""
MASKS = ("part_mask", "object_mask")
"""Fields of a folder's lines that name pictures of the pixels of part and object."""
CHOOSING = 0.25
"""Share of a folder's groups on which the site is chosen where none is named; they are kept out of everything else."""
MIN_SHARE = 0.25
"""Share of a patch's pixels that the part must cover; with half, two of five parts of the scenes have no patch."""


@dataclass(frozen=True, eq=False)
class Shown:
    """Pixels of a part, and of the object it belongs to."""

    part: Bool[np.ndarray, "height width"]
    object: Bool[np.ndarray, "height width"]


@dataclass(frozen=True, eq=False)
class Example:
    """A question whose answer names a part, and the patches that show it; `n_tokens` is the length of its prompt.

    `spelling` and `variants` are those of the pairs it comes from.
    """

    pair: Pair
    places: Places
    n_tokens: int
    spelling: Spelling | None = None
    variants: tuple[Spelling, ...] = ()

    @property
    def prompt(self) -> Prompt:
        """The question about the image."""
        return self.pair.base


@dataclass(frozen=True, eq=False)
class PartMap:
    """One example's patches of the first view with their pixel boxes: which show the part, its object, background."""

    pair: Pair
    boxes: tuple[Box, ...]
    part: tuple[bool, ...]
    object: tuple[bool, ...]
    background: tuple[bool, ...]


@dataclass(frozen=True)
class Examples:
    """All examples of a data set that can be used, and why others cannot."""

    pairs: Pairs
    """Those the examples were made of, one each."""
    examples: tuple[Example, ...]
    refused: tuple[Refused, ...]
    answers: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the provenance says of their answers."""
    n_held_out: int = 0
    """How many others are kept apart, on which a site is chosen."""

    @property
    def name(self) -> str:
        """Of the data set."""
        return self.pairs.name

    @property
    def told(self) -> dict[str, Any]:
        """What the provenance says of them."""
        refused = [dataclasses.asdict(each) for each in self.refused]
        told = {"data": self.pairs.described, "refused": refused, "answers": self.answers}
        return told | ({"n_held_out": self.n_held_out} if self.n_held_out else {})

    def batches(self, size: int) -> list[tuple[Example, ...]]:
        """Examples of equally many tokens together, at most `size` of them."""
        if size < 1:
            raise UsageError(f"a batch of {size} examples is none")
        found = []
        for length in sorted({each.n_tokens for each in self.examples}):
            alike = [each for each in self.examples if each.n_tokens == length]
            found += [tuple(alike[start : start + size]) for start in range(0, len(alike), size)]
        return found


def load_examples(
    vlm: "VLM",
    data: str,
    *,
    n: int | None,
    seed: int = 0,
    split: str = "test",
    min_share: float = MIN_SHARE,
    wording: Wording = BARE,
    variants: Variety = "likeliest",
    whole: bool = False,
    fix_labels: bool = False,
) -> Examples:
    """The examples of generated scenes (`SOME` by default) or of a folder; those that do not fit the model are refused.

    Args:
        variants, whole: which spellings of answers are tried, and how they are compared (see `data.fitting.fitting`).

    Raises:
        UsageError: see `shown_parts` and `examples_of`.
    """
    n = SOME if n is None and data.startswith("scenes/") else n
    found = None if data.startswith("scenes/") else find_data(data)
    drawn = {"n": n, "seed": seed, "wording": wording, "fix_labels": fix_labels}
    if found is not None and found.holds == "items":
        pairs, shown = about_one_picture(found, data, **drawn)
    else:
        pairs = load_pairs(data, split=split, **drawn)
        shown = shown_parts(pairs, seed=seed, split=split)
    alone = any(pair.made for pair in pairs)
    pairs = fitting(vlm, pairs, variants=variants, whole=whole, alone=alone)
    return examples_of(vlm, pairs, shown, min_share=min_share, seed=seed)


def shown_parts(pairs: Pairs, *, seed: int, split: str) -> dict[str, Shown]:
    """Pixels of the part and the object that each pair's question is about.

    Args:
        seed, split: with which the pairs were loaded.

    Raises:
        UsageError: scenes whose questions are about no part, or a folder's pair without masks.
    """
    if not pairs.name.startswith("scenes/"):
        return _folder_parts(pairs)
    found = {}
    for pair in sample_pairs(pairs.name.removeprefix("scenes/"), len(pairs), seed=seed, split=split):
        if pair.question.type != "part":
            raise UsageError(f"data {pairs.name!r} asks about no part; scenes/part does")
        kind, part = pair.question.about
        here = masks(pair.scene)
        number = next(number for number, thing in enumerate(pair.scene.things) if thing.kind == kind)
        whole = np.any([shows for (of, _), shows in here.items() if of == number], axis=0)
        found[pair.scene.key[:12]] = Shown(here[number, part], whole)
    return found


def _folder_parts(pairs: Pairs) -> dict[str, Shown]:
    found = find_data(pairs.name)
    told, folder = pair_fields(pairs.name), Path(pairs.name) if found is None else found.folder
    shown = {}
    for pair in pairs:
        lacking = _lacking(told[pair.id])
        if lacking:
            raise UsageError(f"pair {pair.id} of {pairs.name!r} names no {lacking}, an image of the part's pixels")
        shown[pair.id] = _shown(told[pair.id], folder)
    return shown


def _lacking(fields: Mapping[str, Any]) -> str:
    """The mask that a row lacks; empty where it has both."""
    return next((field for field in MASKS if fields.get(field) is None), "")


def _shown(fields: Mapping[str, Any], folder: Path) -> Shown:
    return Shown(*(pixels_of(fields[field], folder) for field in MASKS))


def about_one_picture(
    found: Found, data: str, *, n: int | None, seed: int, wording: Wording, fix_labels: bool
) -> tuple[Pairs, dict[str, Shown]]:
    """Items with masks as pairs without a second picture (`as_pairs`), and the pixels of their parts.

    Raises:
        UsageError: no item with another answer to compare with, and two masks that can be read.
    """
    rows = found.rows(ReaderOptions(fix_labels, seed))
    fields = {row.id: row.fields for row in rows.rows}
    drawn = items_of(rows, found.folder, found.place, n=n, seed=seed)
    items = Items(str(Path(data)), drawn.used, drawn.refused, drawn.told, drawn.notes).worded(wording)
    shown = dict[str, Shown]()

    def check(pair: Pair) -> None:
        lacking = _lacking(fields[pair.id])
        if lacking:
            raise UsageError(f"it names no {lacking}, an image of the part's pixels")
        if not pair.counterfactual_answer.strip():
            raise UsageError("it has no options, and no other part is known to compare its part with")
        shown[pair.id] = _shown(fields[pair.id], found.folder)

    return checked(as_pairs(items, seed=seed), check, "has masks of a part and its object"), shown


def examples_of(
    vlm: "VLM", pairs: Pairs, shown: dict[str, Shown], *, min_share: float = MIN_SHARE, seed: int = 0
) -> Examples:
    """The pairs with their patches; those without are refused with the reason.

    Args:
        min_share: share of a patch that part or object must cover, above 0.
        seed: draws the background patches.

    Raises:
        UsageError: a share that is none, image tokens that are no patches, or no pair that can be used.
    """
    if not 0 < min_share <= 1:
        raise UsageError(f"min_share is {min_share}; a number above 0 and at most 1 is needed")
    kept: list[Example] = []
    refused = list(pairs.refused)
    for pair in pairs:
        encoded = vlm.encode(pair.base)
        if not encoded.rows[0].images[0].layout.views:
            raise UsageError(f"the image tokens of {vlm.name} are learned queries; they show no part")
        random = np.random.default_rng([seed, zlib.crc32(pair.id.encode())])
        try:
            pair.check_single("masks of a part and its object are of")
            labels_apart(vlm, pair.answer, pair.counterfactual_answer)
            places = places_of(encoded, shown[pair.id], min_share=min_share, random=random)
        except UsageError as error:
            refused.append(Refused(pair.id, str(error)))
            continue
        kept.append(Example(pair, places, encoded.n_pos, pairs.spelling, pairs.variants))
    if not kept:
        raise UsageError(
            f"none of the {len(pairs)} {nouns_of(pairs).many} of {pairs.name} can be used: {refused[-1].reason}"
        )
    left = dataclasses.replace(pairs, pairs=tuple(each.pair for each in kept))
    return Examples(left, tuple(kept), tuple(refused), about_answers(vlm, left))


def held_out(vlm: "VLM", examples: Examples, *, share: float = CHOOSING, seed: int = 0) -> tuple[Examples, Examples]:
    """Examples on which a site is chosen, at least this share of the groups, and the others.

    Examples of one group, and those of one picture, stay together.

    Args:
        share: above 0 and below 1.
        seed: draws the groups.

    Raises:
        UsageError: a single group, which cannot be in both.
    """
    found = []
    for part in by_groups(examples.pairs, (share,), seed=seed):
        ids = {pair.id for pair in part}
        some = tuple(each for each in examples.examples if each.pair.id in ids)
        found.append(dataclasses.replace(examples, pairs=part, examples=some, answers=about_answers(vlm, part)))
    chosen, others = found
    return chosen, dataclasses.replace(others, n_held_out=len(chosen.examples))


def places_of(encoded: Encoded, shown: Shown, *, min_share: float, random: np.random.Generator) -> Places:
    """The patches of part and object, and as many of the background as the part has.

    Background patches show no pixel of the object. The earliest image token is never one of them, so that in a causal
    decoder each choice has something before it.

    Raises:
        UsageError: the part lies in no patch to that share, its object fills the image, there is too little
            background, or no image token before the part lies outside its object.
    """
    part, whole = (patches_of_mask(encoded, each, min_share=min_share) for each in (shown.part, shown.object))
    whole = tuple(sorted({*part, *whole}))
    every = tuple(np.ndindex(*encoded.rows[0].images[0].layout.views[0].grid))
    if len(whole) == len(every):
        raise UsageError("the object fills the whole image, so nothing lies outside of it")
    before = _tokens_before(encoded, part, [cell for cell in every if cell not in whole])
    if not before:
        raise UsageError("no image token before the part lies outside its object, so a causal decoder has no such edge")
    touched = patches_of_mask(encoded, shown.object | shown.part, min_share=np.finfo(float).tiny)
    first = min(every, key=lambda cell: encoded.positions(Patches((cell,)))[0])
    free = [cell for cell in every if cell not in touched and cell != first]
    if len(free) < len(part):
        raise UsageError(f"the part has {len(part)} patches, the background only {len(free)}")
    drawn = sorted(random.choice(len(free), len(part), replace=False).tolist())
    return Places(part, whole, tuple(free[number] for number in drawn))


def _tokens_before(encoded: Encoded, part: tuple[Patch, ...], outside: list[Patch]) -> int:
    """How many patches outside the object come before the part's last one in the prompt."""
    last = max(encoded.positions(Patches(part)))
    return sum(position < last for position in encoded.positions(Patches(tuple(outside))))


def part_maps(vlm: "VLM", examples: Examples, *, n: int = 4) -> tuple[PartMap, ...]:
    """Where the patches of the first `n` examples lie in their pictures, and what they show."""
    found = []
    for example in examples.examples[:n]:
        encoded, places = vlm.encode(example.prompt), example.places
        every = list(np.ndindex(*encoded.rows[0].images[0].layout.views[0].grid))
        held = [tuple(each in some for each in every) for some in (places.part, places.object, places.background)]
        found.append(PartMap(example.pair, encoded.boxes(0), *held))
    return tuple(found)
