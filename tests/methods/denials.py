"""Counts how often a probe that reads by just enough is said not to read: `python -m tests.methods.denials`.

Each of two examples of a scene is right in .05 more than the commonest label, by chance, so that the claim that it is
less is false. Beside half of the scenes, which test, stand claims that the other half declares too. A command, no test.
"""

import numpy as np

from vlm_mech.methods.probing.claims import LEAST
from vlm_mech.results.claim import LEVEL
from vlm_mech.results.statistics import sign_flip_p

DRAWS = 1000
"""Of each number of scenes."""


def said(n_scenes: int, rng: np.random.Generator) -> bool:
    """Whether some scenes say that accuracy lies less than `LEAST` above the commonest label's."""
    above = (rng.random((2 * n_scenes, 1)) < LEAST).astype(float) - LEAST
    p = sign_flip_p(above, np.repeat(np.arange(n_scenes), 2), n_resamples=2000, seed=0)
    return bool(above.mean() < 0 and p[0] < LEVEL)


def main() -> None:
    """Prints a line for each number of scenes of a half."""
    for n_scenes in (16, 32, 64):
        rng = np.random.default_rng(n_scenes)
        declared, tested = ([said(n_scenes, rng) for _ in range(DRAWS)] for _ in range(2))
        both = np.mean(np.logical_and(declared, tested))
        print(f"{n_scenes} scenes: {100 * np.mean(tested):.1f} % tested so, {100 * both:.1f} % declared so too")


if __name__ == "__main__":
    main()
