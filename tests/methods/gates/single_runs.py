"""What an edit does, by single runs: what gates measure with sweeps is held against it."""

import torch

from vlm_mech.interventions.trace import run


def moved(vlm, pairs, edit, flip=False):
    """The mean change of the answers' difference on the pairs' first pictures, or on their second, by single runs."""
    prompts, answers = (pairs.base, (pairs.answer, pairs.counterfactual_answer))
    if flip:
        prompts, answers = pairs.counterfactual, answers[::-1]
    encoded, rows = vlm.encode(prompts), torch.arange(len(pairs))
    own, rival = (vlm.answer_ids(encoded, each) for each in answers)
    after, before = (run(vlm, encoded, each).last for each in (edit, None))
    return ((after - before)[rows, own] - (after - before)[rows, rival]).mean().item()
