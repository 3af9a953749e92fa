"""Generation without padding, whose masks the attention kernel makes itself, and edits of heads in every pass."""

import pytest
import torch

from tests.interventions.test_generation import ROUNDING, common, edited, whole_logits
from tests.zoo import FAMILIES
from tests.zoo.batches import batch, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.interventions.specification import Ablate, Knockout
from vlm_mech.interventions.trace import generate, read, run

WAYS = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}
FIRST_TOKEN = ("paligemma", "instructblip")
"""Families in which an answer cannot be given as a longer prompt: prompts see all their tokens, or have two rows."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_opens_no_key_after_the_query(family):
    """A mask that is None means: the first query sees the first key, whatever room the cache has after the last."""
    vlm = wrapped(family)
    encoded, donors = vlm.encode(batch()[:1]), vlm.encode(batch(9)[:1])
    for name in ("cut", "together"):
        made = generate(
            vlm, encoded, edited(vlm, encoded, donors, name), **common(vlm), **WAYS["static"], output_logits=True
        )
        n_new = 1 if family in FIRST_TOKEN else made.ids.shape[1]
        whole = whole_logits(vlm, encoded, donors, name, made.ids[:, :n_new])
        logits = torch.stack(made.output.logits[:n_new], 1)
        assert (logits - whole).abs().max() <= ROUNDING * max(1.0, whole.abs().max().item()), name


def test_a_static_cache_and_a_knockout_give_the_logits_of_run():
    from vlm_mech import VLM, load_pairs

    vlm, prompts = VLM.load("organism"), load_pairs("scenes/colour", n=3).base
    cut = Knockout("last", "image", range(6))
    right = run(vlm, prompts, cut).last
    for n_new in (1, 3, 8):
        made = generate(
            vlm, prompts, cut, **WAYS["static"], max_new_tokens=n_new, return_dict_in_generate=True, output_logits=True
        )
        assert (made.output.logits[0] - right).abs().max() < 1e-4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("site", [Site("llm.head_out", 2), Site("projector.in")])
def test_what_a_module_makes_of_an_edit_is_asked_within_a_generation(site, way):
    vlm = wrapped("llava_clip")
    encoded = vlm.encode(batch())
    spans = ("image",) if site.stream != "llm" else ("last", "generated", ("last", "generated"))
    for span in spans:
        edit = Ablate(site, span, to="mean", reference=read(vlm, encoded, site)) if span == "image" else None
        edit = edit or Ablate(site, span)
        made = generate(vlm, encoded, edit, **common(vlm) | {"max_new_tokens": 4}, **WAYS[way], output_logits=True)
        (receipt,) = made.receipts
        assert receipt.change > 0 and receipt.readback_error <= receipt.tolerance
        if span != "generated":
            assert (made.output.logits[0] - run(vlm, encoded, edit_of_the_prompt(edit)).last).abs().max() < 1e-4


def edit_of_the_prompt(edit):
    return Ablate(edit.site, "last") if edit.span == ("last", "generated") else edit
