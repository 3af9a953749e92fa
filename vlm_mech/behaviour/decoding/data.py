"""What contrastive decoding is asked: methods, their doses, and the pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_mech.behaviour.decoding.processors import CUTOFF, NOISE_STEP, RATE, START, STRENGTH

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
    """Every setting to choose among, the plain ones first."""
    found = [Setting(sampled=sampled) for sampled in (False, True)]
    for sampled in (False, True):
        if "M3ID" in kinds:
            found += [Setting("M3ID", rate, alpha, sampled) for alpha in alphas for rate in rates]
        if "VCD" in kinds:
            found += [Setting("VCD", strength, 0.0, sampled) for strength in strengths]
    return found


# What follows


def label(method: str, dose: float) -> str:
    """A setting in words."""
    if method in (GREEDY, SAMPLED):
        return method
    kind, _, draw = method.partition(" ")
    alpha, _, draw = draw.rpartition(" ")
    return f"{kind} {draw}, {f'{alpha}, ' if alpha else ''}{DOSES[kind]} {dose:g}"
