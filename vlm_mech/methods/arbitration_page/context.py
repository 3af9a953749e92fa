"""The contextual lens on pictures in conflict: do image tokens name what is shown, or what is usual, by layer?"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from vlm_mech.data.derived_pairs import partners
from vlm_mech.methods.arbitration_page.data import Cases
from vlm_mech.methods.lens.build_bank import build_bank
from vlm_mech.methods.lens.context_bank import RECORD, ContextBank
from vlm_mech.methods.lens.context_lens import context_words
from vlm_mech.methods.lens.leads import INPUT
from vlm_mech.results.result import Metric, Result

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

AUTO = "auto"
TOP = 5
SHOWN, PRIOR, OTHERS = "what is shown", "the prior", "what another image shows"
"""Whose name is looked for; the last is what is named by chance."""
NAMED = Metric("named", "share", f"share of images with the answer among an image token's {TOP} words")


def bank_of(vlm: "VLM", given: str, *, folder: Path, seed: int = 0) -> ContextBank:
    """A bank of text states.

    Args:
        given: `auto` for one of text about generated scenes, the folder of a finished one, or text to build one from.
        folder: where a bank is built.
        seed: draws contexts.

    Raises:
        UsageError: a bank of another model, or nothing that is one or could be built.
    """
    finished = given != AUTO and (Path(given) / RECORD).is_file()
    bank = ContextBank.open(Path(given)) if finished else build_bank(vlm, given, out=folder, seed=seed)
    bank.check(vlm)
    return bank


def names_of(vlm: "VLM", cases: Cases, bank: ContextBank, *, batch: int = 8, seed: int = 0) -> Result:
    """In how many pictures in conflict an image token names an answer, by layer, beside another picture's answer.

    Args:
        bank: of this model.
        batch: prompts per forward pass.
        seed: draws the other pictures.

    Returns:
        A row an example, `whose` answer and `layer` (-1: the decoder's input).
    """
    pairs = list(cases.pairs)
    others = partners(len(pairs), seed=seed, groups=[pair.group or pair.id for pair in pairs])
    answers = {
        SHOWN: [pair.answer for pair in pairs],
        PRIOR: [pair.counterfactual_answer for pair in pairs],
        OTHERS: [pairs[at].answer for at in others],
    }
    words = context_words(vlm, cases.pairs.base, bank, top=TOP, batch_size=batch)
    prompt = np.array([token.example for token in words.tokens])
    rows = []
    for layer, site in zip((INPUT, *vlm.llm_layers), words.sites, strict=True):
        said = [{word.strip().lower() for word in each} for each in words.top_words(site)]
        for whose, wanted in answers.items():
            for number, (pair, answer) in enumerate(zip(pairs, wanted, strict=True)):
                named = any(answer.strip().lower() in said[at] for at in np.flatnonzero(prompt == number))
                row = {"example": pair.id, "group": pair.group or pair.id, "whose": whose, "layer": layer}
                rows.append(row | {"named": float(named), "named_baseline": 0.0})
    return Result("names in context", pd.DataFrame(rows), ("whose", "layer"), (NAMED,))
