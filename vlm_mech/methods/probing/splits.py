"""Classes, groups and splits: a scene and its counterfactual never stand on both sides of one."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from vlm_mech.data.shared_pictures import components
from vlm_mech.errors import UsageError
from vlm_mech.methods.probing.training import Split

if TYPE_CHECKING:
    from vlm_mech.methods.probing.data import Examples

GROUPINGS = ("scene", "template", "both")


def numbered(labels: Sequence[str | None]) -> tuple[tuple[str, ...], Int[np.ndarray, "example"]]:
    """The classes in order, and the number of each label's class.

    Raises:
        UsageError: a label is missing, or there is one class only.
    """
    for number, label in enumerate(labels):
        if label is None or not str(label).strip():
            raise UsageError(f"example {number} has no label; every example needs one")
    classes = tuple(sorted({str(label) for label in labels}))
    if len(classes) < 2:
        raise UsageError(f"every label is {', '.join(classes) or 'missing'}; a probe needs at least two classes")
    return classes, np.array([classes.index(str(label)) for label in labels])


def grouped(examples: "Examples", grouping: str) -> Int[np.ndarray, "example"]:
    """Numbers of what must not be torn apart: scenes, templates, or (`both`) all that hangs together by either.

    Raises:
        UsageError: the grouping is not known.
    """
    if grouping not in GROUPINGS:
        raise UsageError(f"grouping {grouping!r} is not known; use one of {', '.join(GROUPINGS)}")
    keys = {"scene": (examples.groups,), "template": (examples.templates,)}
    # A scene is never torn, whatever else is.
    return components(*keys["scene"], *(() if grouping == "scene" else keys["template"]))


def make_splits(
    labels: Int[np.ndarray, "example"], groups: Int[np.ndarray, "example"], *, n_folds: int, n_seeds: int, seed: int = 0
) -> list[Split]:
    """Folds of whole groups with classes in like shares, partitioned anew for each seed.

    Each fold is the test part once, the next one the validation part, the rest is for training.

    Raises:
        UsageError: fewer than three folds, no seed, or fewer groups, or examples of every class, than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    n_groups = len(np.unique(groups))
    if n_folds < 3 or n_seeds < 1:
        raise UsageError(f"{n_folds} folds and {n_seeds} seeds are given; at least 3 folds and 1 seed are needed")
    if n_groups < n_folds:
        raise UsageError(
            f"{len(labels)} examples form {n_groups} group(s), fewer than {n_folds} folds; give more examples or fewer "
            'folds, or the grouping "scene"'
        )
    most = int(np.bincount(labels).max())
    if most < n_folds:
        raise UsageError(
            f"no class has more than {most} of {len(labels)} examples; {n_folds} folds need {n_folds} of one"
        )
    found = []
    for repeat in range(n_seeds):
        folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed + repeat)
        with warnings.catch_warnings():
            # A rare class in fewer folds than there are is no fault as long as every training part has it.
            warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
            tests = [test for _, test in folds.split(np.zeros(len(labels)), labels, groups)]
        for number, test in enumerate(tests):
            validation = tests[(number + 1) % n_folds]
            rest = np.setdiff1d(np.arange(len(labels)), np.concatenate([test, validation]))
            found.append(Split(rest, validation, test, seed=seed + repeat, repeat=repeat))
    return found


def check_answers(labels: Int[np.ndarray, "example"], classes: Sequence[str], splits: Sequence[Split]) -> None:
    """Raises `UsageError` with the name of an answer that the training part of a split does not have."""
    for split in splits:
        missing = np.setdiff1d(np.arange(len(classes)), labels[split.train])
        if len(missing):
            number = int((labels == missing[0]).sum())
            raise UsageError(
                f"answer {classes[missing[0]]!r} is that of {number} example(s), too few for every training part "
                "to have it; give more examples, fewer folds or a looser grouping"
            )


def check_leaks(splits: Sequence[Split], groups: Sequence[object], *, name: str = "group") -> None:
    """Raises `UsageError` when examples of one group (the two scenes of a pair, say) stand in two parts of a split."""
    for number, split in enumerate(splits):
        parts = {
            part: {groups[example] for example in getattr(split, part)} for part in ("train", "validation", "test")
        }
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
            shared = parts[one] & parts[other]
            if shared:
                raise UsageError(
                    f"{name} {min(map(str, shared))!r} stands in the {one} and the {other} part of split {number}; "
                    "it must be in one"
                )
