"""States of other sites, of the pass itself and of subspaces: what each must equal, on every family and back end."""

import functools

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.zoo import BACKENDS, FEW, FEW_AND_EAGER
from tests.zoo.batches import batch, wrapped
from tests.zoo.tiny import tiny_config, tiny_processor
from vlm_mech.architectures.site import Site, sites
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.by_example import plan_by_example
from vlm_mech.interventions.receipt import ReceiptError, verify
from vlm_mech.interventions.specification import Ablate, Activations, Replace, Steer
from vlm_mech.interventions.state_edits import Project, frozen
from vlm_mech.interventions.subspace import orthonormal
from vlm_mech.interventions.trace import carry_out, generate, read, run
from vlm_mech.models.vlm import VLM

FAMILY = "llava_clip"
SITE, LATER, HEADS = Site("llm.resid_post", 1), Site("llm.resid_post", 2), Site("llm.head_out", 1)


def rows(k, width=32, seed=0):
    """Independent rows that are neither orthogonal nor of one length."""
    return torch.randn(k, width, generator=torch.Generator().manual_seed(seed)) * torch.arange(1.0, k + 1)[:, None]


@functools.cache
def encodings(family, attn="sdpa"):
    vlm = wrapped(family, attn)
    encoded = vlm.encode(batch(1))
    return vlm, encoded, vlm.encode(batch(7)), run(vlm, encoded)


def close(one, other) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize(("family", "attn"), FEW_AND_EAGER)
def test_the_same_site_is_replace_and_own_states_at_their_own_site_change_nothing(family, attn):
    vlm, encoded, donors, base = encodings(family, attn)
    for site in (SITE, HEADS, Site("vision.resid_post", 1)):
        plain = run(vlm, encoded, Replace(site, "image", source=donors), baseline=base)
        named = run(vlm, encoded, Replace(site, "image", source=donors, source_site=site), baseline=base)
        assert torch.equal(named.logits, plain.logits) and not torch.equal(plain.last, base.last)
        own = run(vlm, encoded, Replace(site, "image", source=encoded, source_site=site), baseline=base)
        assert torch.equal(own.logits, base.logits) and own.receipts[0].change == 0.0


@pytest.mark.parametrize(("family", "attn"), BACKENDS)
def test_states_of_other_sites_are_those_that_were_read_there(family, attn):
    vlm, encoded, donors, base = encodings(family, attn)
    early, late = sites("llm.resid_post", (0, 1)), (LATER, Site("llm.resid_pre", 1))
    for source in (None, donors):
        held = read(vlm, encoded if source is None else source, late)
        moved = Activations(dict(zip(early, (held[site] for site in late), strict=True)), held.encoded)
        by_hand = run(vlm, encoded, Replace(early, "image", source=moved), baseline=base)
        found = run(vlm, encoded, Replace(early, "image", source=source, source_site=late), baseline=base)
        assert torch.equal(found.logits, by_hand.logits) and not torch.equal(found.last, base.last)
        assert [each.site for each in found.receipts] == [str(site) for site in early]


def frozen_by_hooks(vlm, encoded, layer):
    """The logits of a pass in which plain hooks write the image's states at a block into the input of all above."""
    kept, blocks = [], list(vlm.model.get_submodule(vlm.family.llm.path))
    cells = encoded.cells("image")

    def hold(_, given, named):
        states = (given[0] if given else named["hidden_states"]).clone()
        if kept:
            states[cells.rows, cells.positions] = kept[0]
        else:
            kept.append(states[cells.rows, cells.positions])
        return ((states, *given[1:]), named) if given else (given, {**named, "hidden_states": states})

    hooks = [block.register_forward_pre_hook(hold, with_kwargs=True) for block in blocks[layer:]]
    with torch.no_grad():
        logits = vlm.model(**encoded.inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize(("family", "attn"), BACKENDS)
def test_frozen_states_are_those_of_a_loop_of_hooks(family, attn):
    vlm, encoded, _, base = encodings(family, attn)
    n_layers, effects = vlm.n_layers("llm"), []
    for layer in (0, n_layers - 2):
        found = run(vlm, encoded, frozen("image", layer, n_layers=n_layers), baseline=base)
        by_hand = frozen_by_hooks(vlm, encoded, layer)
        assert close(found.last, by_hand[:, -1]), layer
        effects.append((found.last - base.last).abs().max().item())
    assert effects[0] > 1e-3


def test_nothing_is_lost_by_freezing_what_is_not_read_again(vlm, prompts):
    """Causal attention: what stands after the last token's states is not there, so that its own logits alone move."""
    base = run(vlm, prompts)
    before = run(vlm, prompts, frozen("last", 1, n_layers=4), baseline=base)
    assert torch.equal(before.logits[:, :-1], base.logits[:, :-1])
    assert not torch.equal(before.last, base.last)
    with pytest.raises(UsageError, match=r"nothing is frozen from layer 3 on: of 4 layers it can be 0\.\.2"):
        frozen("image", 3, n_layers=4)
    for n_layers in (3, 99):
        with pytest.raises(UsageError, match=rf"frozen is given n_layers={n_layers}; the decoder of .* has 4$"):
            run(vlm, prompts, frozen("last", 1, n_layers=n_layers))


@pytest.mark.parametrize(("family", "attn"), FEW_AND_EAGER)
def test_a_subspace_of_full_rank_is_all_and_what_is_taken_out_can_be_put_back(family, attn):
    vlm, encoded, donors, base = encodings(family, attn)
    for site in (SITE, Site("vision.resid_post", 1)):
        width = vlm.width(site)
        plain = run(vlm, encoded, Replace(site, "image", source=donors), baseline=base)
        full = Replace(site, "image", source=donors, subspace=rows(width, width))
        assert close(run(vlm, encoded, full, baseline=base).last, plain.last), site
        some = rows(3, width)
        out = Project(site, "image", basis=some)
        without = run(vlm, encoded, out, baseline=base)
        assert (without.last - base.last).abs().max() > 1e-4 and without.receipts[0].readback_error <= 2e-5
        back = run(vlm, encoded, out & Replace(site, "image", source=encoded, subspace=some), baseline=base)
        assert close(back.last, base.last), site
        onto = run(vlm, encoded, Project(site, "image", basis=rows(width, width), onto=True), baseline=base)
        assert close(onto.last, base.last), site
        center = torch.linspace(-1, 1, width)
        nothing = run(vlm, encoded, Project(site, "image", basis=rows(width, width), center=center), baseline=base)
        held = read(vlm, encoded, site)[site]
        same = Activations({site: center.to(held).expand_as(held)}, encoded)
        assert close(nothing.last, run(vlm, encoded, Replace(site, "image", source=same), baseline=base).last), site


@pytest.mark.parametrize("point", ["resid_pre", "head_out", "attn_out", "mlp_out", "resid_post"])
def test_states_become_what_the_formula_says(vlm, prompts, donors, point):
    site, basis, center = Site(f"llm.{point}", 1), rows(3).double(), torch.linspace(-1, 1, 32).double()
    own, other = (read(vlm, each, site)[site].double() for each in (prompts, donors))
    image = vlm.encode(prompts).cells("image")
    within = basis.T @ torch.linalg.inv(basis @ basis.T) @ basis
    expected = {
        Replace(site, "image", source=donors, subspace=basis.float()): own + (other - own) @ within,
        Project(site, "image", basis=basis.float()): own - own @ within,
        Project(site, "image", basis=basis.float(), onto=True): own @ within,
        Project(site, "image", basis=basis, center=center): own - (own - center) @ within,
        Project(site, "image", basis=basis, center=center, onto=True): center + (own - center) @ within,
    }
    for edit, wanted in expected.items():
        found = read(vlm, prompts, site, edit)[site].double()
        assert torch.allclose(
            found[image.rows, image.positions], wanted[image.rows, image.positions], atol=1e-5, rtol=1e-5
        )
        elsewhere = torch.ones(own.shape[:2], dtype=torch.bool)
        elsewhere[image.rows, image.positions] = False
        assert torch.equal(found[elsewhere], own[elsewhere])


def test_of_chosen_heads_the_subspace_is_as_wide_as_they_are_together(vlm, prompts, donors):
    own, other = (read(vlm, each, HEADS)[HEADS].double() for each in (prompts, donors))
    basis = rows(5, 16).double()
    within = basis.T @ torch.linalg.inv(basis @ basis.T) @ basis
    edit = Replace(HEADS, "last", source=donors, subspace=basis.float(), heads=(3, 1))
    found = read(vlm, prompts, HEADS, edit)[HEADS][:, -1].double().unflatten(-1, (4, 8))
    own, other = (each[:, -1].unflatten(-1, (4, 8)) for each in (own, other))
    wanted = own.clone()
    wanted[:, [3, 1]] += ((other - own)[:, [3, 1]].flatten(1) @ within).unflatten(1, (2, 8))
    assert torch.allclose(found, wanted, atol=1e-5) and torch.equal(found[:, [0, 2]], own[:, [0, 2]])


def test_rows_are_made_orthonormal_in_the_same_way_every_time():
    given = rows(6).to(torch.bfloat16)
    made = orthonormal("it", given)
    assert torch.equal(made, orthonormal("it", given)) and torch.allclose(made @ made.T, torch.eye(6).double())
    assert torch.allclose(given.double() @ made.T @ made, given.double(), atol=1e-9), "they span the same"


def test_what_lies_in_no_subspace_of_the_difference_changes_nothing(vlm, prompts, donors):
    """The zero case: rows at right angles to all that the two runs differ in, at one token."""
    own, other = (read(vlm, each, SITE)[SITE][:1, -1].double() for each in (prompts, donors))
    difference = torch.nn.functional.normalize(other - own)[0]
    across = rows(2).double() - (rows(2).double() @ difference)[:, None] * difference
    edit = Replace(SITE, "last", source=donors[:1], subspace=across)
    assert close(run(vlm, prompts[:1], edit).last, run(vlm, prompts[:1]).last)
    along = Replace(SITE, "last", source=donors[:1], subspace=difference[None])
    whole = Replace(SITE, "last", source=donors[:1])
    assert close(run(vlm, prompts[:1], along).last, run(vlm, prompts[:1], whole).last)


@pytest.mark.parametrize("family", FEW)
def test_edits_of_the_prompt_act_in_its_pass_when_an_answer_is_generated(family):
    vlm, encoded, donors, _ = encodings(family)
    plain = generate(vlm, encoded, max_new_tokens=4)
    edits = [
        Replace(sites("llm.resid_post", (0, 1)), "image", source_site=sites("llm.resid_post", (1, 2))),
        frozen("image", 0, n_layers=vlm.n_layers("llm")),
        Replace(SITE, "image", source=donors, subspace=rows(4)),
        Project(SITE, "all", basis=rows(8)),
    ]
    for edit in edits:
        said = generate(vlm, encoded, edit, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
        assert close(said.output.logits[0], run(vlm, encoded, edit).last)
        assert all(each.change > 0 for each in said.receipts)
    kept = generate(vlm, encoded, Replace(SITE, "image", source=encoded, subspace=rows(4)), max_new_tokens=4)
    assert torch.equal(kept.ids, plain.ids)


def test_generated_tokens_are_projected_too(vlm, prompts):
    full = Project(SITE, ("last", "generated"), basis=rows(32))
    zero = Ablate(SITE, ("last", "generated"))
    said, expected = (generate(vlm, prompts, edit, max_new_tokens=5) for edit in (full, zero))
    assert torch.equal(said.ids, expected.ids)
    with pytest.raises(UsageError, match="Replace has no states to put at generated tokens"):
        generate(vlm, prompts, Replace(SITE, "generated", source_site=LATER))


@pytest.mark.parametrize("family", ["llava_clip", "qwen3_vl", "gemma3"])
def test_each_example_has_its_own_state_edit(family):
    vlm = wrapped(family)
    encoded = vlm.encode([Prompt("what colour is the circle?", each.images) for seed in (1, 3) for each in batch(seed)])
    donors = vlm.encode([Prompt("what colour is the circle?", each.images) for seed in (7, 9) for each in batch(seed)])
    edits = [
        Replace(SITE, "image", source_site=LATER),
        Project(SITE, "image", basis=rows(4)),
        None,
        Replace(SITE, "image", source=donors, source_site=Site("llm.resid_pre", 0), subspace=rows(4)),
    ]
    made = plan_by_example(vlm, encoded, edits, lambda *given: read(vlm, *given))
    _, logits, receipts = carry_out(vlm, encoded, made)
    verify(receipts)
    for number, edit in enumerate(edits):
        assert close(logits[number, -1], run(vlm, encoded, edit).last[number])


def test_an_edit_in_a_subspace_that_does_not_arrive_is_told(vlm, prompts):
    site = Site("llm.mlp_out", 1)
    module = vlm.model.get_submodule(f"{vlm.blocks('llm').path}.1.{vlm.blocks('llm').mlp}")
    hook = module.register_forward_hook(lambda module, given, out: out + 1)
    with pytest.raises(ReceiptError, match="the edit did not take effect"):
        run(vlm, prompts, Project(site, "image", basis=rows(3)))
    hook.remove()


BROKEN, DEPENDENT = rows(3), torch.cat([rows(2), rows(2).sum(0, keepdim=True)])
BROKEN[1, 2] = torch.nan


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Replace(SITE, "image"), "changes nothing; give source="),
        (lambda: Replace(SITE, "image", source_site=SITE, subspace=rows(2)), "changes nothing; give source="),
        (lambda: Replace(SITE, "image", source_site=(SITE, LATER)), r"has 1 site\(s\) and 2 source_site"),
        (lambda: Replace(SITE, "image", source_site="llm.resid_post"), "is given 'llm.resid_post' as a site"),
        (lambda: Replace(SITE, "image", source_site=Site("vision.resid_post", 1)), "positions are not the same"),
        (lambda: Replace(SITE, "image", source_site=Site("projector.out")), "positions are not the same"),
        (lambda: Replace(Site("projector.in"), "image", source_site=Site("projector.out")), "positions are not"),
        (
            lambda: Replace(HEADS, "image", source_site=SITE, heads=(1,)),
            "at head_out sites only, not at llm.resid_post",
        ),
        (lambda: Replace(SITE, "image", source=batch(), subspace=[1.0]), "subspace of Replace is a list"),
        (lambda: Replace(SITE, "image", source=batch(), subspace=torch.ones(32)), r"has shape \(32,\)"),
        (lambda: Replace(SITE, "image", source=batch(), subspace=torch.ones(1, 32).int()), "dtype torch.int32"),
        (lambda: Project(SITE, "image", basis=rows(0)), "has 0 rows of width 32; from 1 row to as many"),
        (lambda: Project(SITE, "image", basis=rows(33)), "has 33 rows of width 32; from 1 row to as many"),
        (lambda: Project(SITE, "image", basis=BROKEN), "basis of Project holds NaN"),
        (lambda: Project(SITE, "image", basis=rows(3) / 0.0), "holds infinite numbers"),
        (lambda: Project(SITE, "image", basis=rows(3), onto="yes"), "onto of Project is 'yes'"),
        (lambda: Project(SITE, "image", basis=rows(3), center=[0.0]), "center of Project is a list"),
        (lambda: Project(SITE, "image", basis=rows(3), center=torch.ones(3)), r"has shape \(3,\)"),
        (lambda: Project(SITE, "image", basis=rows(3), center=BROKEN[1]), "center of Project holds NaN"),
    ],
)
def test_what_changes_nothing_or_has_no_meaning_is_refused_where_it_is_made(made, message):
    with pytest.raises(UsageError, match=message) as refused:
        made()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Project(SITE, "image", basis=DEPENDENT), "has 3 rows of which row 2 follows from those before it"),
        (Project(SITE, "image", basis=torch.zeros(1, 32)), "has 1 rows of which row 0 follows"),
        (Replace(SITE, "image", source_site=LATER, subspace=DEPENDENT), "the subspace of Replace has 3 rows of which"),
        (Project(SITE, "image", basis=rows(3, 31)), r"has rows 31 wide; states at llm.resid_post\[1\] are 32 wide"),
        (Project(HEADS, "image", basis=rows(3), heads=(0, 2)), r"rows 32 wide; .* are 16 wide in 2 head"),
        (Replace(SITE, "image", source_site=Site("llm.resid_post", 9)), r"layer 9 is out of range"),
        (Steer(SITE, "last", vector=torch.ones(31)), "has shape"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_runs(edit, message):
    vlm, encoded, _, _ = encodings(FAMILY)
    with pytest.raises(UsageError, match=message) as refused:
        run(vlm, encoded, edit)
    assert "\n" not in str(refused.value)


def test_states_of_another_width_are_refused():
    """Heads that are wider together than the residual stream."""
    config = tiny_config()
    config.text_config.head_dim = 16
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    vlm = VLM(model, tiny_processor(), check=False)
    with pytest.raises(UsageError, match=r"32 wide, cannot take states of llm.head_out\[1\], which are 64 wide"):
        run(vlm, batch(), Replace(SITE, "image", source_site=HEADS))
