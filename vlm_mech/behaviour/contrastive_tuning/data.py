"""What a contrastive model is tuned on and tested on, and the variants of its tuning."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_mech.behaviour.contrastive_tuning.training import Variant
from vlm_mech.behaviour.erroneous_agreement.data import Case, Cases
from vlm_mech.errors import UsageError
from vlm_mech.inputs.special_tokens import check_known

if TYPE_CHECKING:
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


def variants_of(names: Sequence[str]) -> list[Variant]:
    """The variants of these names, all where none is named.

    Raises:
        UsageError: an unknown name.
    """
    known = {variant.name: variant for variant in VARIANTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"variant {unknown[0]!r} is not known; these are: {', '.join(map(repr, known))}")
    return [known[name] for name in names] or list(VARIANTS)


# Data


@dataclass(frozen=True, eq=False)
class Parts:
    """Pairs to tune on, data sets to choose the learning rate by, and data sets to report."""

    train: Sequence[Case]
    validation: Sequence[Cases]
    test: Sequence[Cases]


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
                raise UsageError(f"{cases.name} has sets of {len(case.images)} pictures; pairs are needed")
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
                f"data {cases.name!r} has no counterfactuals: each case needs two pictures, one caption true of each"
            )


def check_words(encoder: "DualEncoder", data: Sequence[Cases]) -> None:
    """Raise `UsageError` where a caption has a word unknown to the contrastive model."""
    captions = [each for cases in data for case in cases.cases for each in case.captions]
    check_known(_as_vlm(encoder), captions, "caption")


def _as_vlm(encoder: Any) -> Any:
    """An encoder, for a check that asks for a tokenizer alone."""
    return encoder
