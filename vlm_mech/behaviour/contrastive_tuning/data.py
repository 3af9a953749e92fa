"""What a contrastive model is tuned on and tested on, and the variants of its tuning."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vlm_mech.behaviour.contrastive_tuning.batches import Variant
from vlm_mech.behaviour.erroneous_agreement.data import Case, Cases
from vlm_mech.data.picture_splits import SHARES
from vlm_mech.data.user_files import Refused
from vlm_mech.errors import UsageError
from vlm_mech.inputs.contrastive_batch import padded
from vlm_mech.inputs.special_tokens import check_known

if TYPE_CHECKING:
    from vlm_mech.behaviour.contrastive_tuning.captions import Read
    from vlm_mech.models.dual_encoder import DualEncoder

NONE, READER, COUNTERFACTUALS = "none", "VLM", "unlocked: twins"
"""The controls repeat `COUNTERFACTUALS`, at the rate chosen for it. In tables a pair is called twins."""
VARIANTS = (
    Variant("locked: captions", "captions"),
    Variant("locked: negatives", "negatives"),
    Variant("locked: twins", "twins"),
    Variant("locked, decoder: twins", "twins", decoder=True),
    Variant("unlocked: captions", "captions", locked=False),
    Variant("unlocked: negatives", "negatives", locked=False),
    Variant(COUNTERFACTUALS, "twins", locked=False),
    Variant("unlocked, decoder: twins", "twins", locked=False, decoder=True),
    Variant("control, unlocked: sides at random", "twins", locked=False, shuffled="sides"),
    Variant("control, unlocked: shuffled captions", "twins", locked=False, shuffled="captions"),
)
CAPTIONS = "unlocked: captions"
CAPTION_VARIANTS = (
    Variant("locked: captions", "captions"),
    Variant("locked: negatives", "negatives"),
    Variant("locked, decoder: captions", "captions", decoder=True),
    Variant("locked, decoder: negatives", "negatives", decoder=True),
    Variant(CAPTIONS, "captions", locked=False),
    Variant("unlocked: negatives", "negatives", locked=False),
    Variant("unlocked, decoder: captions", "captions", locked=False, decoder=True),
    Variant("unlocked, decoder: negatives", "negatives", locked=False, decoder=True),
    Variant("control, unlocked: captions of others", "captions", locked=False, shuffled="captions"),
)
"""Of single pictures with captions; the first eight are those of arXiv 2411.05195."""
REPEATED = {"twins": COUNTERFACTUALS, "captions": CAPTIONS}
"""What a control repeats, by its objective."""


def variants_of(names: Sequence[str], every: Sequence[Variant] = VARIANTS) -> list[Variant]:
    """The variants of these names, all where none is named.

    Raises:
        UsageError: an unknown name.
    """
    known = {variant.name: variant for variant in every}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"variant {unknown[0]!r} is not known; these are: {', '.join(map(repr, known))}")
    return [known[name] for name in names] or list(every)


# Data


@dataclass(frozen=True, eq=False)
class Parts:
    """Pairs to tune on, data sets to choose the learning rate by, and data sets to report.

    Pictures with captions (`read`) may take the place of the former two: the first `n_held` are to choose by.
    """

    train: Sequence[Case]
    validation: Sequence[Cases]
    test: Sequence[Cases]
    read: "Read | None" = None
    n_held: int = 0


def parted(cases: Cases, *, tested: bool, seed: int) -> tuple[Cases, Cases, Cases]:
    """Cases of a file to tune on, to choose by, and to report, by groups; the last are none unless they are `tested`.

    Raises:
        UsageError: fewer groups than parts.
    """
    shares = {part: share for part, share in SHARES.items() if tested or part != "test"}
    groups = sorted({case.group for case in cases.cases})
    if len(groups) < len(shares):
        raise UsageError(
            f"{cases.name} has {len(groups)} groups of pairs; at least {len(shares)} are needed, one a part"
        )
    order = np.random.default_rng((seed, 5)).permutation(len(groups))
    sizes = [max(1, round(share / sum(shares.values()) * len(groups))) for share in list(shares.values())[1:]]
    ends = np.cumsum([0, len(groups) - sum(sizes), *sizes])
    parts = [{groups[at] for at in order[start:end]} for start, end in itertools.pairwise(ends)]
    some = [tuple(case for case in cases.cases if case.group in part) for part in [*parts, set[str]()][:3]]
    first, second, third = (replace(cases, cases=part) for part in some)
    return first, second, third


def some(cases: Cases, n: int | None) -> Cases:
    """At most n of the cases, evenly spread; all where n is None."""
    if n is None or n >= len(cases.cases):
        return cases
    rows = np.unique(np.linspace(0, len(cases.cases) - 1, n).round().astype(int))
    return replace(cases, cases=tuple(cases.cases[row] for row in rows))


def without_repeats(data: Sequence[Cases], held: Sequence[Cases] = ()) -> list[Case]:
    """The pairs of several data sets, none with the captions of another one or with the pictures of `held`.

    Captions of the same words count as the same: `a left of b` says what `b right of a` does, and both in a batch
    would each be a wrong negative of the other.
    """
    held_pixels = {_pixels(case) for cases in held for case in cases.cases}
    kept: dict[tuple[str, ...], Case] = {}
    for cases in data:
        for case in cases.cases:
            if len(case.images) != 2:
                raise UsageError(f"{cases.name} has sets of {len(case.images)} images; pairs are needed")
            words = tuple(sorted(" ".join(case.captions).split()))
            if _pixels(case) not in held_pixels:
                kept.setdefault(words, case)
    return list(kept.values())


def _pixels(case: Case) -> bytes:
    return b"".join(image.tobytes() for image in case.images)


def check_counterfactuals(data: Sequence[Cases]) -> None:
    """Raise `UsageError` where a data set is given twice or has no pairs."""
    twice = [name for name, count in Counter(cases.name for cases in data).items() if count > 1]
    if twice:
        raise UsageError(f"data {twice[0]!r} is given twice; once is needed")
    for cases in data:
        if not cases.cases or any(len(case.images) != 2 for case in cases.cases):
            raise UsageError(
                f"data {cases.name!r} has no counterfactuals: each case needs two images, one caption true of each"
            )


def check_tunable(encoder: "DualEncoder") -> None:
    """Raise `UsageError` for a model whose pictures do not have one shape."""
    if encoder.family.layout is padded:
        raise UsageError(
            f"{encoder.name} takes images of any shape (NaFlex), which cannot be tuned here; CLIP and SigLIP "
            "can, and SigLIP2 of a fixed size"
        )


def refused_of(data: Sequence[Cases]) -> list[dict[str, str]]:
    """What could not be used of several data sets, for provenance."""
    return [{"id": f"{cases.name}/{each.id}", "reason": each.reason} for cases in data for each in cases.refused]


def in_words_known(encoder: "DualEncoder", cases: Cases) -> Cases:
    """The cases all words of whose captions the contrastive model knows; the others move to `refused`.

    Raises:
        UsageError: none is left.
    """
    kept: list[Case] = []
    refused = list(cases.refused)
    for case in cases.cases:
        try:
            check_known(encoder, case.captions, "caption")
            kept.append(case)
        except UsageError as error:
            refused.append(Refused(case.id, str(error)))
    if not kept:
        raise UsageError(f"no pair of {cases.name} can be read by {encoder.name}: {refused[-1].reason}")
    return replace(cases, cases=tuple(kept), refused=tuple(refused))
