"""What contrastive decoding is asked: methods, their doses, and the pictures."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_mech.behaviour.answering.asked_options import Template, of_all_options, options_of
from vlm_mech.behaviour.decoding.processors import ALPHA, CUTOFF, NOISE_STEP, RATE, START, STRENGTH
from vlm_mech.data.derived_pairs import by_groups, checked, conflict_first, with_conflict
from vlm_mech.data.examples import load_examples
from vlm_mech.data.fitting import askable, fitting
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.data.reading import check_options
from vlm_mech.errors import UsageError
from vlm_mech.inputs.wording import BARE, Wording

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

VALIDATION, TEST = "validation", "test"
PLAIN, GREEDY, SAMPLED = "plain", "greedy", "sampled"
PAPER = {"M3ID": RATE, "VCD": STRENGTH}
DOSES = {"M3ID": "lambda", "VCD": "a"}


@dataclass(frozen=True)
class Setting:
    """A way to decode: `plain`, `M3ID` or `VCD`, its dose (lambda or a), M3ID's alpha, and whether it is sampled."""

    kind: str = PLAIN
    dose: float = 0.0
    alpha: float = 0.0
    sampled: bool = False

    @property
    def method(self) -> str:
        """Its name without the dose."""
        draw = SAMPLED if self.sampled else GREEDY
        if self.kind == PLAIN:
            return draw
        return f"{self.kind}{f' alpha {self.alpha:g}' if self.kind == 'M3ID' else ''} {draw}"


@dataclass(frozen=True)
class Options:
    """What all settings of a run share."""

    start: int = START
    cutoff: float = CUTOFF
    noise_step: int = NOISE_STEP
    max_new_tokens: int = 8
    letters: bool = False
    seed: int = 0


def grid(kinds: Sequence[str], alphas: Sequence[float], rates: Sequence[float], strengths: Sequence[float]) -> list[
    Setting
]:  # fmt: skip
    """Every setting to choose among, the plain ones first.

    Raises:
        UsageError: no method, or one twice.
    """
    if len(set(kinds)) != len(kinds) or not kinds:
        raise UsageError(f"methods {' '.join(kinds) or '(none)'}: M3ID, VCD or both are needed, each once")
    found = [Setting(sampled=sampled) for sampled in (False, True)]
    for sampled in (False, True):
        if "M3ID" in kinds:
            found += [Setting("M3ID", rate, alpha, sampled) for alpha in alphas for rate in rates]
        if "VCD" in kinds:
            found += [Setting("VCD", strength, 0.0, sampled) for strength in strengths]
    return found


def fixed(kinds: Sequence[str]) -> list[Setting]:
    """Plain greedy decoding, and each method greedy with its paper's values; nothing is chosen.

    Raises:
        UsageError: no method, or one twice.
    """
    grid(kinds, (), (), ())
    return [Setting(), *(Setting(kind, PAPER[kind], ALPHA if kind == "M3ID" else 0.0) for kind in kinds)]


def parts_of(
    vlm: "VLM", data: str, *, n: int | None, seed: int, wording: Wording = BARE, fix_labels: bool = False
) -> tuple[Pairs, Pairs]:
    """Validation and test pairs (or items) in conflict that fit the model: splits of the scenes, or halves of a folder.

    Raises:
        UsageError: no pair says which picture is in conflict, or fewer than two pairs in a part.
    """
    scenes, parts = data.startswith("scenes/"), (VALIDATION, TEST)
    drawn = {"n": n, "seed": seed, "wording": wording, "fix_labels": fix_labels}
    loaded = [load_examples(data, split=split, **drawn) for split in (parts if scenes else (TEST,))]
    both = [conflict_first(fitting(vlm, with_conflict(pairs), spoken=True, alone=True)) for pairs in loaded]
    validation, test = both if scenes else by_groups(both[0], (0.5,), seed=seed)
    for pairs, part in ((validation, VALIDATION), (test, TEST)):
        if len(pairs) < 2:
            raise UsageError(f"{pairs.name} gives {len(pairs)} example for {part}; at least two are needed")
    return validation, test


def every_pair(
    vlm: "VLM", data: str, template: Template, *, n: int | None, seed: int, wording: Wording = BARE,
    fix_labels: bool = False, n_new: int = 8,
) -> Pairs:  # fmt: skip
    """All pairs, both pictures of which are asked about in a way, in conflict or not; or all single items.

    Args:
        n_new: tokens of an answer at most.

    Raises:
        UsageError: as for `load_pairs`, or fewer than two pairs that the model has tokens and room for.
    """
    template.check_known(vlm)
    pairs = of_all_options(load_examples(data, n=n, seed=seed, wording=wording, fix_labels=fix_labels))
    asked = (dataclasses.replace(pair, question=template.asked(pair.question, options_of(pair))) for pair in pairs)
    pairs = dataclasses.replace(pairs, pairs=tuple(asked))

    def check(pair: Pair) -> None:
        if len(options_of(pair)) < 2:
            raise UsageError("it has no options, among which --both reads answers")
        check_options(options_of(pair))
        if pair.made:
            vlm.encode(pair.base).check_room(n_new)

    found = checked(pairs, check, "can be asked")
    found = found if found.made else askable(vlm, found, n_new=n_new)
    if len(found) < 2:
        raise UsageError(f"{found.name} gives {len(found)} example; at least two are needed")
    return found


# What follows


def label(method: str, dose: float) -> str:
    """A setting in words."""
    if method in (GREEDY, SAMPLED):
        return method
    kind, _, draw = method.partition(" ")
    alpha, _, draw = draw.rpartition(" ")
    return f"{kind} {draw}, {f'{alpha}, ' if alpha else ''}{DOSES[kind]} {dose:g}"
