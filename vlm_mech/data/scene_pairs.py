"""Pairs of generated scenes."""

from vlm_mech.data.counterfactual_scenes import sample_pairs
from vlm_mech.data.pair import Pair
from vlm_mech.data.render import render
from vlm_mech.inputs.wording import Wording


def scene_pairs(name: str, n: int, seed: int, split: str, wording: Wording) -> tuple[Pair, ...]:
    """Pairs of a generated set (`scenes/colour`, ...) with their pictures drawn."""
    return tuple(
        Pair(
            id=found.scene.key[:12],
            image=render(found.scene),
            counterfactual_image=render(found.counterfactual),
            question=found.question.text,
            answer=found.question.answer,
            counterfactual_answer=found.counterfactual_answer,
            conflict=found.conflict,
            wording=wording,
        )
        for found in sample_pairs(name.removeprefix("scenes/"), n, seed=seed, split=split)
    )
