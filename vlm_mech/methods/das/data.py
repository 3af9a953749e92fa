"""What is interchanged: prompts with those that lend them states, in both directions; and parts of unlike objects."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.data.derived_pairs import by_groups
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import DIRECTIONS, Pairs, linked
from vlm_mech.data.shared_pictures import components
from vlm_mech.data.user_files import Refused
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.trace import run

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

PARTS = ("train", "validation", "test")
SHARES = (0.5, 0.25)
"""Shares of the objects in the first two parts."""
WRONG = "the model answers one of its two images wrongly"


@dataclass(frozen=True, eq=False)
class Parts:
    """Pairs to train on, to choose by and to tell of; no object is in two of them."""

    train: Pairs
    validation: Pairs
    test: Pairs

    @property
    def counts(self) -> dict[str, int]:
        """Pairs of each part."""
        return {name: len(getattr(self, name)) for name in PARTS}


@dataclass(frozen=True, eq=False)
class Interchange:
    """A batch of prompts, the prompts that lend each its states, and the first tokens of both answers.

    `wanted` is right for the picture of the lender, `own` for that of the prompt. `names` tell the examples apart,
    `groups` which of them are of one scene.
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    encoded: Encoded
    source: Encoded
    wanted: Int[Tensor, " batch"]
    own: Int[Tensor, " batch"]


def answered(vlm: "VLM", pairs: Pairs, *, only_correct: bool, batch: int) -> Pairs:
    """The pairs that fit the model, spelt as it would, and (`only_correct`) both of whose pictures it answers rightly.

    The others move to `refused`.

    Raises:
        UsageError: none is left.
    """
    pairs = linked(fitting(vlm, pairs, by_first_token=True))
    if not only_correct:
        return pairs
    kept, refused = [], list(pairs.refused)
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        right = torch.ones(len(some), dtype=torch.bool)
        for prompts, answers in ((some.base, some.answer), (some.counterfactual, some.counterfactual_answer)):
            encoded = vlm.encode(prompts)
            right &= (run(vlm, encoded).last.argmax(-1) == vlm.answer_ids(encoded, answers)).cpu()
        kept += [pair for pair, is_right in zip(some, right.tolist(), strict=True) if is_right]
        refused += [
            Refused(pair.id, WRONG) for pair, is_right in zip(some, right.tolist(), strict=True) if not is_right
        ]
    if not kept:
        raise UsageError(
            f"{vlm.name} answers no pair of {pairs.name} rightly on both images; only_correct=False takes all"
        )
    return dataclasses.replace(pairs, pairs=tuple(kept), refused=tuple(refused))


def parts_of(pairs: Pairs, objects: Sequence[str], *, seed: int) -> Parts:
    """Parts by objects: half of them to train on, a quarter to choose by, the rest to tell of.

    Args:
        objects: of each pair what no two parts may share; pairs of one group, or with a picture in common, stay
            together too.
        seed: draws which objects.

    Raises:
        UsageError: too few objects for three parts, or a part of fewer than two pairs.
    """
    names = [pair.group or pair.id for pair in linked(pairs)]
    numbers = components(objects, names).tolist()
    by_object = [
        dataclasses.replace(pair, group=f"object {number}") for pair, number in zip(pairs, numbers, strict=True)
    ]
    found = by_groups(dataclasses.replace(pairs, pairs=tuple(by_object)), SHARES, seed=seed)
    own = {pair.id: pair for pair in pairs}
    parts = [dataclasses.replace(pairs, pairs=tuple(own[pair.id] for pair in part)) for part in found]
    small = [name for name, part in zip(PARTS, parts, strict=True) if len(part) < 2]
    if small:
        raise UsageError(
            f"the {small[0]} part of {pairs.name} has one pair alone; more pairs of each object are needed"
        )
    return Parts(*parts)


def interchanges(vlm: "VLM", pairs: Pairs, batch: int) -> Iterator[Interchange]:
    """Both directions of the pairs, `batch` prompts at a time: each picture's run with states of the other one's."""
    sides = (pairs.base, pairs.counterfactual), (pairs.answer, pairs.counterfactual_answer)
    for own, direction in enumerate(DIRECTIONS):
        for start in range(0, len(pairs), batch):
            rows = slice(start, start + batch)
            some, (prompts, lenders) = pairs[rows], (sides[0][own][rows], sides[0][1 - own][rows])
            encoded, source = vlm.encode(prompts), vlm.encode(lenders)
            wanted, rival = (vlm.answer_ids(encoded, sides[1][side][rows]) for side in (1 - own, own))
            names = tuple(f"{pair.id} {direction}" for pair in some)
            groups = tuple(pair.group or pair.id for pair in some)
            yield Interchange(names, groups, encoded, source, wanted, rival)


def check_site(vlm: "VLM", site: Site) -> None:
    """Raises `UsageError` for a site before the decoder, or one that the model does not have."""
    if not isinstance(site, Site):
        raise UsageError(f"train_das is given {site!r:.60} as a site; one Site is needed: Site('llm.resid_post', 3)")
    vlm.check_site(site)
    if site.stream != "llm":
        raise UsageError(f"train_das takes sites of the decoder, not {site}")
