"""By how much the lens lets an answer lead its rival where the two part, in the input and after each block."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.results import metrics
from vlm_mech.results.metrics import AnswerLogits
from vlm_mech.sweeps.measures import Comparison, Measure, comparison
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.recorded_pass import record

if TYPE_CHECKING:
    from vlm_mech.methods.lens.tuned_lens import TunedLens
    from vlm_mech.models.vlm import VLM

INPUT = -1
"""Layer that stands for what the decoder receives; other layers are outputs of blocks."""


def depth_sites(vlm: "VLM") -> list[Site]:
    """The decoder's input, and the output of each of its blocks."""
    return [Site("llm.resid_pre", 0), *(Site("llm.resid_post", layer) for layer in vlm.llm_layers)]


def depth_named(layer: int) -> str:
    """A depth in words: the output of a layer, or the decoder's input (`INPUT`)."""
    return "the decoder's input" if layer == INPUT else f"the output of layer {layer}"


def against(name: Comparison, answer: Sequence[str], rival: Sequence[str]) -> Measure:
    """The comparison of that name of an answer with its rival, 0 where the rival is the answer itself.

    Planted models have such rivals; pairs of a user do not (`data.fitting`).
    """
    found = comparison(name, answer, rival)
    if len(found.answers) > 2:
        return found
    of = _where_they_part if found.at == "parting" else found.of
    either = {"at": "whole", "parts": False}
    return dataclasses.replace(found, of=lambda *both: of(*both).where(~_alike(*both), 0.0), **either)


def _alike(answer: AnswerLogits, rival: AnswerLogits) -> Bool[Tensor, "batch"]:
    """Whether two answers are the same."""
    n_both = min(answer.ids.shape[1], rival.ids.shape[1])
    alike = (answer.ids[:, :n_both] == rival.ids[:, :n_both]).all(1)
    return alike & (answer.present.sum(1) == rival.present.sum(1))


def _where_they_part(answer: AnswerLogits, rival: AnswerLogits) -> Float[Tensor, "batch"]:
    """Logit of one answer minus that of another at the first token in which they differ."""
    n_both = min(answer.ids.shape[1], rival.ids.shape[1])
    one, other = answer.ids[:, :n_both], rival.ids[:, :n_both]
    # Of equal values the first is taken.
    rows, at = torch.arange(len(one), device=one.device), (one != other).int().argmax(1)
    return metrics.logit_diff(answer.logits[rows, at], *(each[rows, at] for each in (one, other)), apart=False)


def leads_of(
    vlm: "VLM",
    pairs: Pairs,
    rivals: Sequence[str],
    measure: Comparison = "logit_diff",
    *,
    tuned: "TunedLens | None" = None,
) -> list[Float[np.ndarray, "example"]]:
    """What the lens makes of an answer against its rival in the decoder's input and after each block.

    The logits are those that the lens reads of the states where the tokens of both are predicted, in one clean pass.

    Args:
        rivals: one for each pair.
        measure: how the two are compared (see `measures.comparison`), in its unit.
        tuned: translators to apply before the norm, for each of `depth_sites` but the last.
    """
    written = [pairs.written(each) for each in rivals]
    asked = readings_of(vlm, vlm.encode(pairs.base), [against(measure, pairs.answer, written)])
    clean, found = record(vlm, asked.encoded), []
    with torch.no_grad():
        for depth, site in enumerate(depth_sites(vlm)):
            states = clean.hidden(depth)[:, asked.encoded.n_prompt - 1 :]
            flat = states.flatten(0, 1)
            logits = vlm.readout(flat if tuned is None else tuned.translate(site, flat))
            found.append(asked.value(0, logits.unflatten(0, states.shape[:2])).double().cpu().numpy())
    return found
