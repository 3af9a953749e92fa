"""Examples of either kind: pairs as they are, and single items as pairs whose counterfactual picture is made."""

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from vlm_mech.data.blur import blurred_out, mean_coloured
from vlm_mech.data.facts import is_facts
from vlm_mech.data.item import Item
from vlm_mech.data.items import Items, load_items
from vlm_mech.data.pair import Made, Pair
from vlm_mech.data.pairs import Pairs, load_pairs
from vlm_mech.data.row_fields import as_given
from vlm_mech.data.sources import find_data
from vlm_mech.data.user_files import Refused
from vlm_mech.data.words import words_of
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import Altered, ImageLike, load_image
from vlm_mech.inputs.wording import BARE, Wording

SHOWN = {
    "other": "the picture of another item",
    "blur": "the same picture, blurred (a Gaussian kernel of 61 pixels at a long side of 448)",
    "mean": "a picture of its mean colour",
}
PRIOR, ONLY, DRAWN = "the usual answer", "the other option", "a wrong option, drawn"
SAID, NONE = "another answer to the same question, drawn", "none"
"""What the wrong answer is with which that of an item is compared."""


def holds_items(name_or_folder: str | Path) -> bool:
    """Whether a source of `--data` holds single items.

    Raises:
        UsageError: it is not told which of several files of a folder is meant.
    """
    if str(name_or_folder).startswith("scenes/") or is_facts(str(name_or_folder)):
        return False
    found = find_data(name_or_folder)
    return found is not None and found.holds == "items"


def load_examples(
    name_or_folder: str | Path,
    *,
    counterfactual: Made | None = None,
    n: int | None = None,
    seed: int = 0,
    split: str = "test",
    wording: Wording = BARE,
    fix_labels: bool = False,
) -> Pairs:
    """Pairs (see `load_pairs`), or single items as pairs (see `as_pairs`).

    Args:
        counterfactual: how the counterfactual pictures of items are made; `none` by default.
        n, seed, split, wording, fix_labels: as for `load_pairs` and `load_items`; items have no split.

    Raises:
        UsageError: as for `load_pairs` and `load_items`, or counterfactual pictures to be made for pairs.
    """
    drawn: dict[str, Any] = {"n": n, "seed": seed, "wording": wording, "fix_labels": fix_labels}
    if holds_items(name_or_folder):
        return as_pairs(load_items(name_or_folder, **drawn), counterfactual or "none", seed=seed)
    pairs = load_pairs(name_or_folder, **drawn, split=split)
    if counterfactual is not None:
        raise UsageError(
            f"counterfactual is {counterfactual!r}, and {pairs.name} holds pairs, which have pictures of both"
        )
    return pairs


def check_made(name_or_folder: str | Path, counterfactual: Made | None, what: str) -> None:
    """Raises `UsageError` where single items are given to what needs a counterfactual picture, and none is made.

    Args:
        what: needs it, for the error.
    """
    if counterfactual in (None, "none") and holds_items(name_or_folder):
        raise UsageError(
            f"data {str(name_or_folder)!r} holds single items, and {what} needs a counterfactual picture: "
            "--counterfactual other (another item's), blur or mean (its own, blurred or of its mean colour) makes one"
        )


def as_pairs(items: Items, counterfactual: Made = "none", *, seed: int = 0) -> Pairs:
    """Single items as pairs: of the picture made for each nothing is known, and the second answer is a wrong one.

    That is the prior where there is one that is not right, else the other option, else one of several options drawn
    with the seed, else an answer to the same question that is right of another item; `notes` count these.

    Args:
        counterfactual: `other` takes the picture of another item, of another group and, where there is one, of the same
            size; `blur` blurs the picture as the last step of a visual decay does; `mean` shows its mean colour; `none`
            makes no picture.
        seed: draws these.

    Raises:
        UsageError: another word, or no other item whose picture could be taken.
    """
    if not isinstance(items, Items):
        raise UsageError(f"as_pairs takes Items, not a {type(items).__name__}; load_items(folder) gives some")
    if counterfactual not in get_args(Made):
        raise UsageError(f"counterfactual is {counterfactual!r:.60}; other, blur, mean or none is needed")
    known = _right_answers(items)
    second = _others(items, seed) if counterfactual == "other" else [_made(item, counterfactual) for item in items]
    pairs, refused, kinds = [], list(items.refused), Counter[str]()
    for item, made in zip(items, second, strict=True):
        foil, kind = _foil(item, known[item.question], random.Random(f"{seed}/{item.id}"))
        if made is None:
            refused.append(Refused(item.id, "no other item's picture can be taken: all are of one group"))
            continue
        kinds[kind] += 1
        pairs.append(
            Pair(
                item.id,
                item.image,
                as_given(list(made)),
                item.question,
                item.answer,
                foil,
                item.group,
                "first" if item.conflict else None,
                item.wording,
                options=item.options,
                prior=item.prior,
                category=item.category,
                captions=item.captions,
                made=counterfactual,
            )
        )
    if not pairs:
        raise UsageError(f"no item of {items.name} has a counterfactual picture: {refused[-1].reason}")
    told = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
    shown = "" if counterfactual == "none" else f"counterfactual picture: {SHOWN[counterfactual]}; "
    note = f"single items; {shown}right answers are compared with: {told}"
    return Pairs(items.name, tuple(pairs), tuple(refused), drawn=items.drawn, notes=(*items.notes, note))


def with_note(pairs: Pairs, note: str) -> Pairs:
    """The pairs; single items say this in place of what their correct answers are compared with."""
    return dataclasses.replace(pairs, notes=(*pairs.notes[:-1], f"single items; {note}")) if pairs.made else pairs


def _right_answers(items: Items) -> dict[str, list[str]]:
    """By question the correct answers of all items, each once."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for item in items:
        found[item.question][item.answer] = None
    return {question: list(answers) for question, answers in found.items()}


def _foil(item: Item, said: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """A wrong answer, and what it is; an empty one where none is known."""
    own = words_of(item.answer)
    others = [each for each in item.options if words_of(each) != own]
    if (
        item.prior is not None
        and words_of(item.prior) not in ((), own)
        and (not item.options or item.prior in item.options)
    ):
        return item.prior, PRIOR
    if len(others) == 1:
        return others[0], ONLY
    if others:
        return rng.choice(others), DRAWN
    elsewhere = [each for each in said if words_of(each) not in ((), own)]
    return (rng.choice(elsewhere), SAID) if elsewhere else ("", NONE)


def _made(item: Item, counterfactual: Made) -> tuple[ImageLike, ...]:
    """The pictures of an item, altered; they are made when they are opened."""
    if counterfactual == "none":
        return ()
    return tuple(Altered(image, blurred_out if counterfactual == "blur" else mean_coloured) for image in item.images)


def _others(items: Items, seed: int) -> list[tuple[ImageLike, ...] | None]:
    """For each item the pictures of one of another group, if possible of the same sizes; None where there is none."""
    sizes = [tuple(load_image(image).size for image in item.images) for item in items]
    groups = [item.group or item.id for item in items]
    rows = range(len(items))
    order = random.Random(f"others/{seed}").sample(rows, len(items))
    alike: dict[Any, list[int]] = defaultdict(list)
    for number in order:
        alike[sizes[number]].append(number)
        alike[len(sizes[number])].append(number)
    found: list[tuple[ImageLike, ...] | None] = []
    for number in rows:
        after = (_after(number, alike[key], groups) for key in (sizes[number], len(sizes[number])))
        other = next((each for each in after if each is not None), None)
        found.append(None if other is None else items[other].images)
    return found


def _after(number: int, ring: Sequence[int], groups: Sequence[str]) -> int | None:
    """The first of a ring after a number that is of another group."""
    start = ring.index(number)
    return next((each for each in (*ring[start + 1 :], *ring[:start]) if groups[each] != groups[number]), None)
