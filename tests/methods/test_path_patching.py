"""Path patching: identities, sums that are linear, an implementation by plain hooks, and the table of many senders."""

import pytest
import torch

from tests.zoo import FEW_AND_EAGER
from tests.zoo.batches import batch, pairs_of, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.interventions.head_inputs import HeadInput, read_head_inputs, run_with_head_inputs
from vlm_mech.interventions.receipt import ReceiptError
from vlm_mech.interventions.specification import Replace
from vlm_mech.interventions.trace import read, run
from vlm_mech.methods.path_patching.data import Sender
from vlm_mech.methods.path_patching.figures import drawn
from vlm_mech.methods.path_patching.study import path_patch, path_patching


def close(found, expected, scale=1e-5) -> bool:
    return bool((found - expected).abs().max() <= scale * max(1.0, expected.abs().max().item()))


def both(family, attn="sdpa"):
    vlm = wrapped(family, attn)
    return vlm, vlm.encode(batch(1)), vlm.encode(batch(7))


def receivers_of(vlm):
    """Each kind of receiver, after block 1."""
    last = len(vlm.llm_layers) - 1
    return [
        Site("llm.resid_pre", 2),
        Site("llm.resid_post", last),
        (HeadInput("q", 2, (1,)), HeadInput("k", 3, (0, 1)), HeadInput("v", 3, (0,))),
    ]


@pytest.mark.parametrize(("family", "attn"), FEW_AND_EAGER)
def test_a_donor_that_is_the_prompt_changes_nothing(family, attn):
    vlm, encoded, donor = both(family, attn)
    mlps = "freeze" if attn == "eager" else "recompute"
    plain = run(vlm, encoded).logits
    for receivers in receivers_of(vlm):
        same = path_patch(vlm, encoded, encoded, Sender(1, 2), receivers, mlps=mlps)
        other = path_patch(vlm, encoded, donor, Sender(1, 2), receivers, mlps=mlps)
        assert torch.equal(same.logits, plain)
        assert all(each.change == 0 for each in same.receipts)
        assert not torch.equal(other.logits, plain) and any(each.change > 0 for each in other.receipts)


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_5_vl", "llava_next_mistral", "paligemma"])
def test_with_mlps_held_the_paths_of_all_heads_add_up(family):
    """Before a receiver the direct ways are linear: their sum is what all heads send together, and follows from W_O."""
    vlm, encoded, donor = both(family)
    receiver = Site("llm.resid_pre", 3)
    clean = read(vlm, encoded, receiver)[receiver]
    senders = [Sender(layer, head) for layer in range(3) for head in range(vlm.n_heads("llm"))]
    sent = [
        path_patch(vlm, encoded, donor, each, receiver, mlps="freeze").received[receiver] - clean for each in senders
    ]
    together = path_patch(vlm, encoded, donor, senders, receiver, mlps="freeze").received[receiver] - clean
    rows, positions = encoded.cells("all").rows, encoded.cells("all").positions
    assert close(torch.stack(sent).sum(0)[rows, positions], together[rows, positions])
    assert together[rows, positions].abs().max() > 1e-2
    by_weights = torch.zeros_like(together)
    for layer in range(3):
        site = Site("llm.head_out", layer)
        own, other = (read(vlm, each, site)[site] for each in (encoded, donor))
        blocks = vlm.blocks("llm")
        out = vlm.model.get_submodule(f"{blocks.path}.{layer}.{blocks.attention}.{blocks.out}")
        by_weights += (other - own) @ out.weight.detach().T
    assert close(by_weights[rows, positions], together[rows, positions])


def test_queries_keys_and_values_of_a_block_are_what_its_input_is_to_its_heads():
    """All heads of a block with the inputs that a path makes give what the replaced residual stream makes them give."""
    vlm, encoded, donor = both("llava_clip")
    every = tuple(range(vlm.n_heads("llm")))
    parts = tuple(HeadInput(part, 2, every) for part in ("q", "k", "v"))
    by_parts = path_patch(vlm, encoded, donor, Sender(0, 1), parts)
    receiver, heads = Site("llm.resid_pre", 2), Site("llm.head_out", 2)
    received = path_patch(vlm, encoded, donor, Sender(0, 1), receiver).received[receiver]
    edit = Replace(receiver, "all", source=type(read(vlm, encoded, receiver))({receiver: received}, encoded))
    out = read(vlm, encoded, heads, edit)
    expected = run(vlm, encoded, Replace(heads, "all", source=out))
    assert close(by_parts.last, expected.last) and not close(by_parts.last, run(vlm, encoded).last)


def hooked(vlm, module, change):
    """Within a pass, the first input of a module is what `change` makes of it."""
    return vlm.model.get_submodule(module).register_forward_pre_hook(lambda _, given: (change(given[0]), *given[1:]))


@pytest.mark.parametrize("mlps", ["recompute", "freeze"])
def test_it_equals_an_implementation_by_plain_hooks(mlps):
    """Sender L0H2, receiver the query of L2H1: module hooks on output and query projections, in three passes."""
    vlm, encoded, donor = both("llava_clip")
    blocks, d_head, n = vlm.blocks("llm"), 8, len(vlm.llm_layers)
    width = vlm.model.get_submodule(f"{blocks.path}.0.{blocks.attention}.{blocks.out}").in_features
    d_head = width // vlm.n_heads("llm")
    sender, receiver = slice(2 * d_head, 3 * d_head), slice(d_head, 2 * d_head)

    def path(layer, part):
        return f"{blocks.path}.{layer}.{part}"

    def one_pass(inputs, changes=(), outputs=()):
        hooks = [hooked(vlm, module, change) for module, change in changes]
        for module, change in outputs:
            made = vlm.model.get_submodule(module)
            hooks.append(made.register_forward_hook(lambda _, __, out, change=change: change(out)))
        with torch.no_grad():
            logits = vlm.model(**inputs).logits
        for each in hooks:
            each.remove()
        return logits

    def keep(into, key):
        return lambda states: into.setdefault(key, states.clone())

    z, new, mlp, query = {}, {}, {}, {}
    out = [path(layer, f"{blocks.attention}.{blocks.out}") for layer in range(n)]
    one_pass(
        encoded.inputs,
        [(out[layer], keep(z, layer)) for layer in range(n)],
        [(path(layer, blocks.mlp), keep(mlp, layer)) for layer in range(n)],
    )
    one_pass(donor.inputs, [(out[layer], keep(new, layer)) for layer in range(n)])

    def sent(states):
        states = z[0].clone()
        states[..., sender] = new[0][..., sender]
        return states

    held = [(path(layer, blocks.mlp), lambda _, layer=layer: mlp[layer]) for layer in range(2) if mlps == "freeze"]
    reads = path(2, f"{blocks.attention}.q_proj")
    one_pass(encoded.inputs, [(out[0], sent), (out[1], lambda _: z[1])], [*held, (reads, keep(query, "made"))])

    def received(states):
        states = states.clone()
        states[..., receiver] = query["made"][..., receiver]
        return states

    expected = one_pass(encoded.inputs, outputs=[(reads, received)])
    found = path_patch(vlm, encoded, donor, Sender(0, 2), HeadInput("q", 2, (1,)), mlps=mlps)
    assert close(found.last, expected[:, -1])
    assert (found.last - run(vlm, encoded).last).abs().max() > 1e-6


@pytest.mark.parametrize(("family", "attn"), FEW_AND_EAGER)
def test_the_table_of_many_senders_is_that_of_single_paths(family, attn):
    vlm, pairs = wrapped(family, attn), pairs_of(2)
    senders = [Sender(0, 1), Sender(1, 3)]
    for receivers in receivers_of(vlm):
        for at in ("last",) if receivers == Site("llm.resid_pre", 2) else ("all",):
            result = path_patching(vlm, pairs, receivers, senders=senders, at=at)
            for sender in senders:
                single = path_patch(vlm, pairs.base, pairs.counterfactual, sender, receivers, at=at)
                rows = result.table[(result.table["layer"] == sender.layer) & (result.table["head"] == sender.head)]
                ids = [
                    vlm.answer_ids(vlm.encode(pairs.base), each) for each in (pairs.answer, pairs.counterfactual_answer)
                ]
                lead = [
                    float(logits[own] - logits[other]) for logits, own, other in zip(single.last, *ids, strict=True)
                ]
                assert rows["logit_diff"].tolist() == pytest.approx(lead, abs=1e-4)


def test_a_table_of_paths_is_told_and_drawn():
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    result = path_patching(vlm, pairs, Site("llm.resid_post", len(vlm.llm_layers) - 1), mlps="freeze", batch=1)
    n_paths = len(vlm.llm_layers) * vlm.n_heads("llm")
    assert len(result.table) == 2 * n_paths and result.provenance["receipts"]["writes"] > n_paths
    assert result.findings[0].startswith(
        f"{n_paths} paths to llm.resid_post[{len(vlm.llm_layers) - 1}], MLPs between held"
    )
    effects = result.summary()["effect"]
    largest = max(effects, key=abs)
    assert f"is {largest:+.3g} logits; the median over paths is {effects.median():+.3g}." in result.findings[0]
    assert set(drawn(result)) == {"paths"}


def test_what_a_kernel_does_not_use_is_found_out(monkeypatch):
    vlm, encoded, donor = both("llava_clip")
    inputs = (HeadInput("v", 1, (0,)),)
    found = read_head_inputs(vlm, donor, inputs)
    logits, (receipt,) = run_with_head_inputs(vlm, encoded, found, encoded.cells("image"))
    assert receipt.change > 0 and receipt.n_cells == len(encoded.cells("image")) and receipt.reaches
    assert (logits - run(vlm, encoded).logits).abs().max() > 1e-4
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    router = ALL_ATTENTION_FUNCTIONS["sdpa"]
    real = router.original

    def deaf(module, query, key, value, mask, **options):
        return real(module, query, key, value * 0.5, mask, **options)

    object.__setattr__(router, "original", deaf)
    try:
        with pytest.raises(ReceiptError, match="the attention function received states that differ"):
            run_with_head_inputs(vlm, encoded, found, encoded.cells("image"))
    finally:
        object.__setattr__(router, "original", real)


@pytest.mark.parametrize(
    ("senders", "receivers", "message"),
    [
        ((), Site("llm.resid_pre", 2), "at least one is needed"),
        (Sender(2, 0), Site("llm.resid_pre", 2), "no path leads from L2H0"),
        (Sender(0, 9), Site("llm.resid_pre", 2), "head 9 of L0H9"),
        ((Sender(0, 0), Sender(0, 0)), Site("llm.resid_pre", 2), "the sender 'L0H0' is given twice"),
        (Sender(0, 0), Site("llm.resid_post", 1), "a receiver is"),
        (Sender(0, 0), (Site("llm.resid_pre", 1), HeadInput("q", 1, (0,))), "a receiver is"),
        (Sender(0, 0), HeadInput("q", 1, (9,)), "head 9"),
    ],
)
def test_a_path_that_is_none_is_refused_in_one_line(senders, receivers, message):
    vlm, encoded, donor = both("llava_clip")
    with pytest.raises(UsageError, match=message) as told:
        path_patch(vlm, encoded, donor, senders, receivers)
    assert "\n" not in str(told.value)
