"""What would edit other tokens, or none, is refused, or does what it says."""

import math
import warnings

import pytest
import torch

from tests.zoo.batches import batch, pairs_of, wrapped
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Each, OneImage, Patches, Positions, Tokens
from vlm_mech.interventions.receipt import ReceiptError
from vlm_mech.interventions.specification import Ablate, Knockout, Replace, Steer
from vlm_mech.interventions.trace import read, run
from vlm_mech.sweeps.measures import prob
from vlm_mech.sweeps.sweep import grid, sweep

pytestmark = pytest.mark.usefixtures("untyped")
SITE, HEADS = Site("llm.resid_post", 1), Site("llm.head_out", 1)
FAMILY = "llava_clip"
VECTOR = torch.ones(8)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Ablate(HEADS, "image", heads=()), "Ablate names no head"),
        (lambda: Ablate(HEADS, "image", heads=(True,)), "whole numbers are needed"),
        (lambda: Ablate(SITE, ()), "names no token"),
        (lambda: Ablate(SITE, None), "None is not a span"),
        (lambda: Ablate(SITE, {"image"}), "is not a span"),
        (lambda: Knockout((), "image", 1), "names no token"),
        (lambda: Knockout("last", (), 1), "names no token"),
        (lambda: Knockout("last", "image", 1, heads=()), "Knockout names no head"),
        (lambda: Knockout("last", "image", True), "whole numbers are needed"),
        (lambda: Replace(SITE, "image", source=batch(), source_span=()), "names no token"),
        (lambda: Steer(SITE, "last", vector=VECTOR, scale="2"), "scale of Steer is '2'"),
        (lambda: Steer(SITE, "last", vector=VECTOR, scale=math.nan), "a finite number is needed"),
        (lambda: Steer(SITE, "last", vector=VECTOR, scale=math.inf), "a finite number is needed"),
        (lambda: Steer(SITE, "last", vector=VECTOR, scale=torch.ones(8, 1)), "a finite number is needed"),
        (lambda: Steer(SITE, "last", vector=VECTOR.to(torch.complex64)), "complex"),
    ],
)
def test_what_edits_nothing_or_is_no_number_is_refused_where_it_is_made(made, message):
    with pytest.raises(UsageError, match=message) as refused:
        made()
    assert "\n" not in str(refused.value)


def test_an_infinite_vector_is_refused_in_one_line():
    vlm = wrapped(FAMILY)
    vector = torch.full((vlm.width(SITE),), math.inf)
    with pytest.raises(UsageError, match=r"the steering vector for llm.resid_post\[1\] holds infinite numbers"):
        run(vlm, batch(), Steer(SITE, "last", vector=vector))


@pytest.mark.parametrize("edit", [Ablate(SITE, "generated"), Ablate(SITE, ("last", "generated"))])
def test_generated_tokens_are_no_part_of_a_run(edit):
    for each in (edit, Knockout(edit.span, "image", 1), edit & Ablate(SITE, "last")):
        with pytest.raises(UsageError, match="generated tokens are edited by generate"):
            run(wrapped(FAMILY), batch(), each)


@pytest.mark.parametrize("of_key", [False, True])
@pytest.mark.parametrize("shape", [lambda own: own, lambda own: ("last", own), lambda own: (("last", own), "system")])
def test_batches_of_a_sweep_take_their_own_part_of_an_each(shape, of_key):
    vlm, pairs = wrapped(FAMILY), pairs_of(6)
    own = shape(Each(tuple(Patches(((number % 4, number // 4),)) for number in range(6))))
    edit = Knockout("last", ("system", own), [1, 2]) if of_key else Ablate(SITE, own)
    tables = [
        sweep(vlm, pairs, grid(layer=[1]), lambda point: edit, prob(pairs.answer), batch=size, engine=engine).table
        for size, engine in ((6, "trace"), (2, "fast"), (2, "trace"))
    ]
    for table in tables[1:]:
        assert (table["prob"] - tables[0]["prob"]).abs().max() < 1e-6
    alone = [
        run(vlm, [prompt], Ablate(SITE, shape(Each((Patches(((number % 4, number // 4),)),))))).last[0]
        for number, prompt in enumerate(pairs.base)
    ]
    whole = run(vlm, pairs.base, Ablate(SITE, own)).last
    assert (whole - torch.stack(alone)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_5_vl", "idefics3"])
@pytest.mark.parametrize("kind", [Patches, Tokens, Positions])
def test_states_are_exchanged_in_the_order_in_which_tokens_are_named(family, kind):
    vlm = wrapped(family)
    encoded, source = (vlm.encode(batch(seed)[:1]) for seed in (1, 9))
    first, second = ((0, 0), (1, 1)) if kind is Patches else encoded.positions("image")[1:4:2]
    crossed = Replace(SITE, kind((first, second)), source=source, source_span=kind((second, first)))
    plain = Replace(SITE, kind((first, second)), source=source)
    apart = Replace(SITE, kind((first,)), source=source, source_span=kind((second,))) & Replace(
        SITE, kind((second,)), source=source, source_span=kind((first,))
    )
    right = run(vlm, encoded, apart).last
    assert torch.equal(run(vlm, encoded, crossed).last, right)
    assert not torch.equal(run(vlm, encoded, plain).last, right)
    same = Replace(SITE, kind((second, first)), source=source)
    assert torch.equal(run(vlm, encoded, same).last, run(vlm, encoded, plain).last)


def test_two_pictures_of_a_prompt_are_exchanged():
    vlm = wrapped(FAMILY)
    encoded = vlm.encode(Prompt("what colour is the circle?", [picture(1, 56, 56), picture(2, 56, 56)]))
    one, two = OneImage(0), OneImage(1)
    crossed = Replace(SITE, (one, two), source=encoded, source_span=(two, one))
    apart = Replace(SITE, one, source=encoded, source_span=two) & Replace(SITE, two, source=encoded, source_span=one)
    assert torch.equal(run(vlm, encoded, crossed).last, run(vlm, encoded, apart).last)
    assert not torch.equal(run(vlm, encoded, crossed).last, run(vlm, encoded).last)


@pytest.mark.parametrize("site", [SITE, Site("projector.out")])
def test_a_source_span_with_the_name_of_an_image_is_held_against_its_grid(site):
    vlm = wrapped("qwen2_5_vl")
    own, other = (vlm.encode(Prompt("is it red?", picture(1, *size))) for size in ((56, 84), (84, 56)))
    assert len(own.positions("image")) == len(other.positions("image")) and own.grids() != other.grids()
    for span in ("image", OneImage(0), ("image", "last") if site == SITE else "image"):
        for source_span in (None, span):
            with pytest.raises(UsageError, match="give both the same size"):
                run(vlm, own, Replace(site, span, source=other, source_span=source_span))
    one = Replace(site, Patches(((0, 0), (0, 1))), source=other, source_span=Patches(((0, 0), (0, 1))))
    assert run(vlm, own, one).receipts[0].change > 0


def test_a_baseline_is_the_plain_run_of_the_same_prompts():
    vlm = wrapped(FAMILY)
    edit, prompts = Ablate(SITE, "image"), batch()
    right = run(vlm, prompts, edit).receipts
    assert run(vlm, prompts, edit, baseline=run(vlm, prompts)).receipts == right
    for baseline, message in (
        (run(vlm, batch(9)), "of other prompts"),
        (run(vlm, prompts[:1]), "of other prompts"),
        (run(vlm, prompts, edit), "an edited run"),
        (run(vlm, prompts).logits, "not a Tensor"),
    ):
        with pytest.raises(UsageError, match=message):
            run(vlm, prompts, edit, baseline=baseline)


@pytest.mark.parametrize("before", [False, True])
def test_a_hook_of_the_users_is_named(before):
    vlm = wrapped(FAMILY)
    layers = vlm.blocks("llm").path
    changed = vlm.model.get_submodule(f"{layers}.{2 if before else 1}")

    def halved(module, given, result=None):
        states = given if before else result
        return tuple(each * 0.5 for each in states) if isinstance(states, tuple) else states * 0.5

    register = changed.register_forward_pre_hook if before else changed.register_forward_hook
    hook = register(halved)
    try:
        named = f"hook .*halved of {layers}.{2 if before else 1}"
        with pytest.warns(UserWarning, match=named):
            read(vlm, batch(), SITE)
        with pytest.raises(ReceiptError, match=f"did not take effect: the forward .*{named} may change"):
            run(vlm, batch(), Ablate(SITE, "image", to="mean", reference=read(vlm, batch(), SITE)))
    finally:
        hook.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        read(vlm, batch(), SITE)
