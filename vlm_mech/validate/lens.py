"""The lens as a method that is graded: the layers that are claimed to write the answer or to bring a prior in."""

import dataclasses
from typing import Any

import pandas as pd

from vlm_mech.data.pairs import Pairs
from vlm_mech.methods.gates.gated import Options
from vlm_mech.methods.lens.claims import PUSH, RISE, STEP, pool
from vlm_mech.methods.lens.leads import INPUT
from vlm_mech.methods.lens.study import GIVEN, OTHER_IMAGE, lens_lead
from vlm_mech.organism.planted import Planted
from vlm_mech.results.claim import Claim
from vlm_mech.results.claiming import corrected_together
from vlm_mech.results.result import Result
from vlm_mech.validate.commands import UNGATED
from vlm_mech.validate.statements import Claims, cells_of


def logit_lens(planted: Planted, pairs: Pairs, *, asked: Options = UNGATED) -> Claims:
    """What is claimed of the answer's lead over the other picture's answer, and over the prior of its object.

    A layer across which the first rises writes the answer; one across which the second falls suppresses it. The claims
    of both are corrected together.

    Args:
        asked: how claims are tested.
    """
    how: dict[str, Any] = {"gates": asked.gates, "null": asked.null, "seed": asked.seed, "batch": len(pairs)}
    answers = lens_lead(planted.vlm, pairs, **how)
    priors = lens_lead(planted.vlm, pairs, against=planted.priors(pairs), **how)
    told = corrected_together(answers.claims, priors.claims)
    return Claims(
        _cells(answers),
        writing=_layers(told, RISE, OTHER_IMAGE),
        suppressing=_layers(told, PUSH, GIVEN),
        told=told,
        possible=(*pool(answers), *pool(priors)),
    )


def _layers(told: tuple[Claim, ...], kind: str, rival: str) -> tuple[int, ...]:
    """The layers of the made claims of a kind about one rival."""
    made = [claim.about for claim in told if claim.made and claim.kind == kind]
    return tuple(sorted(int(about["layer"]) for about in made if about["rival"] == rival))


def _cells(result: Result) -> pd.DataFrame:
    """What each layer adds to the lead."""
    across = dataclasses.replace(result, table=result.table[result.table["layer"] != INPUT], known={})
    return cells_of(across, STEP, place="rival").assign(place="answer")
