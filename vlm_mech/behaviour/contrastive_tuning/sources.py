"""From the options of a run to what is tuned on, chosen by and reported."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_mech.behaviour.contrastive_tuning.captions import Read, read_captions
from vlm_mech.behaviour.contrastive_tuning.data import Parts, check_counterfactuals, parted, some
from vlm_mech.behaviour.erroneous_agreement.data import Cases, load_cases
from vlm_mech.errors import UsageError

if TYPE_CHECKING:
    from vlm_mech.models.dual_encoder import DualEncoder

TEXT = "llava:"
USUAL = {"train": 224, "validation": 48}
"""Generated pairs of each set by default."""
HELD = 256
"""Pictures with captions that are held out at most."""


def is_text(train: Sequence[str]) -> bool:
    """Whether it is training text that is tuned on."""
    return any(name.startswith(TEXT) for name in train)


def check_options(
    train: Sequence[str], data: Sequence[str], rates: Sequence[float], *, sides: bool, n_validation: int | None = None
) -> None:
    """Raises `UsageError` for options that cannot be, before anything is loaded.

    Args:
        n_validation: how many are to choose a rate by; the usual number by default.
    """
    if not rates or min(rates) <= 0:
        raise UsageError(f"rates {' '.join(map(str, rates))}: learning rates above zero are needed")
    if not train or not data:
        raise UsageError("--data and --train need a data set each")
    check_choice(rates, n_validation)
    texts = [name for name in train if name.startswith(TEXT)]
    if texts and len(texts) < len(train):
        raise UsageError(f"train {' '.join(train)}: pairs and training text are not tuned on together")
    if sides and not texts:
        raise UsageError(f"--sides is for training text, as in --train {TEXT}FILE")


def check_choice(rates: Sequence[float], n: int | None) -> None:
    """Raises `UsageError` where there are several rates and nothing to choose by."""
    if n == 0 and len(set(rates)) > 1:
        raise UsageError(
            f"rates {' '.join(map(str, rates))}: nothing is held out to choose by; give one rate, or more validation"
        )


def load_parts(
    train: Sequence[str],
    data: Sequence[str],
    *,
    n: int | None,
    n_train: int | None,
    n_validation: int | None,
    **options: Any,
) -> tuple[list[Cases], list[Cases], list[Cases]]:
    """Pairs to tune on, to choose by, and to report; of files those that are reported are in no other part.

    Args:
        train: none of it is loaded if it is training text.
        n, n_train, n_validation: pairs of each set; all of files and `USUAL` of generated ones by default. Of
            `n_validation` 0 is none.
        options: further ones of `load_cases`.

    Raises:
        UsageError: a source without pairs, or with too few.
    """
    train = () if is_text(train) else train
    dealt = {
        name: parted(load_cases(name, n=None, split="train", **options), tested=name in data, seed=options["seed"])
        for name in train
        if not name.startswith("scenes/")
    }

    def loaded(names: Sequence[str], part: int, split: str, size: int | None) -> list[Cases]:
        found = [
            some(dealt[name][part], size)
            if name in dealt
            else load_cases(name, n=USUAL.get(split) if size is None else size, split=split, **options)
            for name in names
        ]
        check_counterfactuals(found)
        return found

    test = loaded(data, 2, "test", n)
    validation = [] if n_validation == 0 else loaded(train, 1, "validation", n_validation)
    return loaded(train, 0, "train", n_train), validation, test


def with_captions(
    parts: Parts,
    train: Sequence[str],
    encoder: "DualEncoder",
    *,
    sides: bool,
    n_train: int | None,
    n_held: int | None,
    seed: int,
) -> Parts:
    """The parts with pictures and captions of training text in place of pairs to tune on and to choose by.

    Args:
        n_train: how many are tuned on; all by default. n_held: how many are held out; see `held_out`.
    """
    n = None if n_train is None else n_train + (n_held or 0)
    return held_out(parts, read_captions(train, encoder, sides=sides, n=n, seed=seed), n_held=n_held, seed=seed)


def held_out(parts: Parts, read: Read, *, n_held: int | None, seed: int) -> Parts:
    """The parts with what was read; those held out are drawn with the seed.

    Args:
        n_held: how many are held out; a tenth of them, `HELD` at most, by default.

    Raises:
        UsageError: none is left to tune on.
    """
    n = len(read.used)
    held = min(HELD, n // 10) if n_held is None else n_held
    if not 0 <= held < n:
        raise UsageError(f"{held} of {n} images with captions are to be held out; fewer than that are needed")
    order = np.random.default_rng((seed, 6)).permutation(n)
    return replace(parts, read=replace(read, used=tuple(read.used[at] for at in order)), n_held=held)
