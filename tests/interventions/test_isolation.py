"""Attention knockout in every family: what is cut off does not matter, what is not cut does not change."""

import functools

import pytest
import torch

from tests.zoo import ALL_AND_EAGER, BACKENDS, ZOO
from tests.zoo.batches import QUESTIONS, SHAPES
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Each, Positions
from vlm_mech.interventions.attention import Cutting, cutting
from vlm_mech.interventions.plan import plan
from vlm_mech.interventions.specification import Knockout, Steer
from vlm_mech.interventions.trace import read, run
from vlm_mech.models.vlm import VLM
from vlm_mech.sweeps.engine import Engine

ROUNDING = 1e-5


@functools.cache
def wrapped(family: str, attn: str) -> VLM:
    return VLM(*ZOO[family](attn, 0), name=family, check=False)


def asked(seed: int) -> list[Prompt]:
    """Two questions about pictures that are cut alike whatever the seed."""
    return [Prompt(question, picture(seed + number, *SHAPES["wide"])) for number, question in enumerate(QUESTIONS[:2])]


@pytest.mark.parametrize(("family", "attn"), ALL_AND_EAGER)
def test_an_image_that_no_text_can_read_does_not_matter(family, attn):
    vlm = wrapped(family, attn)
    here, there = (vlm.encode(asked(seed)) for seed in (0, 40))
    outside = tuple(
        Positions(tuple(position for position in row.present if position not in row.image)) for row in here.rows
    )
    blind = Knockout(Each(outside), "image", vlm.llm_layers)
    answers = [run(vlm, encoded, blind).last for encoded in (here, there)]
    seeing = [run(vlm, encoded).last for encoded in (here, there)]
    scale = max(1.0, seeing[0].abs().max().item())
    assert (seeing[0] - seeing[1]).abs().max() > 100 * ROUNDING * scale
    assert (answers[0] - answers[1]).abs().max() <= ROUNDING * scale
    fast = [Engine(vlm, encoded).answers([blind])[0][0] for encoded in (here, there)]
    assert (fast[0] - fast[1]).abs().max() <= ROUNDING * scale


@pytest.mark.parametrize(("family", "attn"), BACKENDS)
def test_a_patch_that_no_other_can_read_changes_nothing_but_itself(family, attn):
    vlm = wrapped(family, attn)
    encoded = vlm.encode(asked(0)[:1])
    alone = Knockout("image", "all", range(vlm.vision_depth), stream="vision", keep_self=True)
    cell = encoded.positions("image", 0, place="vision")[3]
    width = vlm.width(Site("vision.resid_pre", 0))
    push = Steer(Site("vision.resid_pre", 0), Positions((cell,)), vector=torch.linspace(-2, 2, width))
    last = Site("vision.resid_post", vlm.vision_depth - 1)
    quiet, pushed, mixed, moved = (read(vlm, encoded, last, edit)[last] for edit in (alone, alone & push, None, push))
    cells = encoded.cells("image", place="vision")
    chosen = torch.tensor([position == cell for position in cells.positions.tolist()])
    change = (pushed - quiet).abs().amax(-1)[cells.rows, cells.positions]
    assert (change[chosen] > 1e-3).all() and change[~chosen].max() == 0.0
    # Without the cut the others do see it.
    assert (moved - mixed).abs().amax(-1)[cells.rows, cells.positions][~chosen].max() > 1e-3


@pytest.mark.parametrize(("family", "attn"), BACKENDS)
def test_where_nothing_is_cut_the_run_is_the_unedited_one_to_the_bit(family, attn):
    vlm = wrapped(family, attn)
    encoded = vlm.encode(asked(0))
    # Of the prompt nothing is cut, though the attention of every block goes through the wrapper.
    later = Knockout("generated", "image", vlm.llm_layers)
    blocks = vlm.blocks("llm")
    modules = {
        vlm.model.get_submodule(f"{blocks.path}.{layer}.{blocks.attention}"): Cutting(cuts, attn, *encoded.shape("llm"))
        for (_, layer), cuts in plan(vlm, encoded, later, read, generating=True).cuts.items()
    }
    with torch.no_grad(), cutting(modules):
        watched = vlm.model(**encoded.inputs).logits
    with torch.no_grad():
        assert torch.equal(watched, vlm.model(**encoded.inputs).logits)
    assert all(cut.n_calls == 1 for cut in modules.values()) and len(modules) == len(vlm.llm_layers)


def test_a_knockout_of_no_layer_is_refused():
    with pytest.raises(UsageError, match="Knockout names no layer"):
        Knockout("last", "image", ())
