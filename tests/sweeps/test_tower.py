"""Edits of tower and projector: nothing below them is run, several versions share a pass, all is as the reference."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.sweeps.test_schedule import PLENTY, middling
from tests.sweeps.test_sweep import close, encodings
from tests.zoo import BACKENDS
from tests.zoo.batches import batch, pairs_of, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.errors import WorkError
from vlm_mech.interventions.module_hooks import forward_through, narrowed
from vlm_mech.interventions.plan import plan
from vlm_mech.interventions.receipt import ReceiptError
from vlm_mech.interventions.specification import Ablate, Knockout, Replace
from vlm_mech.interventions.trace import run
from vlm_mech.sweeps import engine
from vlm_mech.sweeps.cost import sizes, tower_flops
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.measures import prob
from vlm_mech.sweeps.sweep import grid, sweep
from vlm_mech.sweeps.tower import TowerPass, tower_outputs

POINTS = ("resid_pre", "head_out", "attn_out", "mlp_out", "resid_post")


def edits_of(vlm, donors):
    """Every kind of edit before the decoder, alone, several at once, and with one in the decoder."""
    projector = [
        Replace(Site("projector.in"), "image", source=donors),
        Ablate(Site("projector.out"), "image", to="mean"),
    ]
    edits = [*projector, projector[0] & projector[1]]
    for layer in vlm.vision_layers:
        edits += [Ablate(Site(f"vision.{point}", layer), "image") for point in POINTS]
        edits.append(Replace(Site("vision.resid_pre", layer), "all", source=donors))
        window = range(layer, min(layer + 2, vlm.n_layers("vision")))
        edits.append(Knockout("image", "image", window, stream="vision", heads=(0, 1), keep_self=True))
        more = Ablate(Site("vision.mlp_out", layer), "image") & Knockout("last", "all", 1, keep_self=True)
        edits.append(more & Ablate(Site("vision.resid_post", 1), "image", to="mean") & projector[1])
    return edits


def told(receipts):
    """What is exactly the same by either way."""
    kept = ("site", "intervention", "witness", "n_cells", "n_edges", "reaches", "reason", "rows")
    return sorted(tuple(str(getattr(each, name, "")) for name in kept) for each in receipts if "llm" not in each.site)


@pytest.fixture
def together(monkeypatch):
    """Sets how many versions share a pass, where the tower takes several; gives how many passes have run."""

    def at_once(n_copies):
        monkeypatch.setattr(engine, "copies_at_once", lambda size, *_: n_copies if size.tower.copies else 1)
        whole, seen = TowerPass.run, []
        monkeypatch.setattr(TowerPass, "run", lambda each: seen.append(len(each.plans)) or whole(each))
        return seen

    return at_once


@pytest.mark.parametrize(("family", "attn"), BACKENDS)
def test_versions_that_share_a_pass_are_as_the_reference(family, attn, together):
    vlm, seen = wrapped(family, attn), together(5)
    encoded, donors = encodings(family, attn)
    edits, baseline = edits_of(vlm, donors), run(vlm, encoded)
    logits, receipts = Engine(vlm, encoded).answers(edits)
    assert set(seen) == ({1} if family == "mistral3" else {5, len(edits) % 5} - {0})
    for number, edit in enumerate(edits):
        reference = run(vlm, encoded, edit, baseline=baseline)
        assert close(logits[number], reference.last), edit
        assert told(receipts[number]) == told(reference.receipts)
        ours, theirs = (
            sorted(each, key=lambda receipt: receipt.site) for each in (receipts[number], reference.receipts)
        )
        for one, other in zip(ours, theirs, strict=True):
            kinds = ("change", "natural_mass", "pass_readout_change")
            for kind in set(kinds) & set(vars(one)):
                assert getattr(one, kind) == pytest.approx(getattr(other, kind), rel=1e-3, abs=1e-4), (edit, kind)


def rows_of_blocks(vlm, work):
    """Rows, or positions of a pack, that each block of the tower computes."""
    blocks = vlm.model.get_submodule(vlm.family.vision.path)
    seen = [0 for _ in blocks]

    def count(layer):
        def counted(_, given):
            seen[layer] += len(given[0])

        return counted

    hooks = [
        block.get_submodule(vlm.family.vision.norm_1).register_forward_pre_hook(count(layer))
        for layer, block in enumerate(blocks)
    ]
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@pytest.mark.parametrize("family", ["llava_clip", "llava_next_mistral", "qwen2_5_vl", "gemma3", "mistral3"])
def test_only_what_can_change_is_computed(family):
    vlm = wrapped(family)
    encoded, _ = encodings(family)
    once, depth, n_layers = (
        rows_of_blocks(vlm, lambda: tower_outputs(vlm, encoded)),
        vlm.vision_depth,
        vlm.n_layers("vision"),
    )
    assert len(once) == n_layers and min(once) == max(once) > 0
    edits = [Ablate(Site("vision.resid_post", layer), "image") for layer in vlm.vision_layers]
    edits += [Ablate(Site("vision.resid_pre", layer), "image") for layer in vlm.vision_layers]
    edits += [Ablate(Site("projector.in"), "image"), Ablate(Site("projector.out"), "image")]
    cells = Engine(vlm, encoded)
    cells.tower = tower_outputs(vlm, encoded)
    found = rows_of_blocks(vlm, lambda: cells.answers(edits))
    # Writes of resid_pre at this block or below it, and of resid_post below it; of what is not read only the edited.
    expected = [layer + 1 + layer if layer < depth else 1 for layer in vlm.vision_layers]
    assert [rows // each for rows, each in zip(found, once, strict=True)] == expected
    for edit in edits[-2:]:
        assert sum(rows_of_blocks(vlm, lambda edit=edit: cells.answers([edit]))) == 0


def test_a_grid_over_the_tower_costs_what_can_change():
    vlm, encoded, donors = middling("eager")
    edits = [Replace(Site("vision.resid_pre", layer), "image", source=donors) for layer in vlm.vision_layers]
    cells, size = Engine(vlm, encoded, PLENTY), sizes(vlm, encoded)
    with FlopCounterMode(display=False) as decoder, torch.no_grad():
        hidden = cells.clean.hidden(0)
        # As the engine runs it: whole rows through every block, one position of each read out.
        for each in cells.clean.blocks:
            block = vlm.model.get_submodule(vlm.family.llm.path)[0]
            block(hidden, attention_mask=None, **each.arguments)
        vlm.readout(hidden[:, -1])
    with FlopCounterMode(display=False) as counter:
        cells.answers(edits)
    tower = size.tower
    depth = vlm.vision_depth
    bound = sum(
        max(0, depth - layer) * tower.block + tower.projector + decoder.get_total_flops() for layer in vlm.vision_layers
    )
    assert counter.get_total_flops() <= 1.15 * bound
    unread = [plan(vlm, encoded, edit, cells._read) for edit in edits]
    assert [tower_flops(size, each) - tower.patches - tower.projector for each in unread] == [
        (depth - layer if layer < depth else 1) * tower.block for layer in vlm.vision_layers
    ]


def test_what_changes_states_on_their_way_is_found():
    vlm = wrapped("llava_clip")
    encoded, _ = encodings("llava_clip")
    edits = {
        "model.vision_tower.encoder.layers.2": Ablate(Site("vision.resid_post", 1), "image"),
        "model.vision_tower.encoder.layers.1.layer_norm1": Ablate(Site("vision.resid_pre", 1), "image"),
        "model.vision_tower.encoder.layers.1.layer_norm2": Ablate(Site("vision.attn_out", 1), "image"),
        "model.multi_modal_projector": Ablate(Site("vision.resid_post", 2), "image"),
        "model.multi_modal_projector.linear_1": Ablate(Site("projector.in"), "image"),
    }
    for path, edit in edits.items():
        module = vlm.model.get_submodule(path)
        hook = module.register_forward_pre_hook(lambda _, given: (given[0] + 0.1, *given[1:]))
        try:
            with pytest.raises(ReceiptError, match="the edit did not take effect"):
                Engine(vlm, encoded).answers([edit])
        finally:
            hook.remove()
        Engine(vlm, encoded).answers([edit])


def test_wrong_states_of_the_clean_tower_are_found_by_the_reference(monkeypatch):
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    points = grid(layer=(1, 2))

    def ablate(point):
        return Ablate(Site("vision.resid_pre", point.layer), "image", to="mean")

    sweep(vlm, pairs, points, ablate, prob(pairs.answer), check=2)
    right = engine.tower_outputs
    monkeypatch.setattr(engine, "tower_outputs", lambda *given: [each * 1.5 for each in right(*given)])
    with pytest.raises(WorkError, match="the fast engine differs from the reference by"):
        sweep(vlm, pairs, points, ablate, prob(pairs.answer), check=2)


def test_blocks_are_themselves_again_after_an_error():
    vlm = wrapped("llava_clip")
    encoded, _ = encodings("llava_clip")
    blocks = list(vlm.model.get_submodule(vlm.family.vision.path))
    # A forward of an instance, such as those by which nnsight and accelerate follow a module.
    own = [block.forward for block in blocks]
    hook = blocks[2].register_forward_pre_hook(lambda _, given: (given[0] + 0.1, *given[1:]))
    try:
        with pytest.raises(ReceiptError):
            Engine(vlm, encoded).answers([Ablate(Site("vision.resid_post", 1), "image")])
    finally:
        hook.remove()
    assert [block.forward for block in blocks] == own
    plain = torch.nn.Linear(2, 2)
    with forward_through(plain, lambda own, given: own(given) + 1):
        assert torch.equal(plain(torch.ones(2)), plain.weight.sum(1) + plain.bias + 1)
    assert "forward" not in vars(plain)


def test_arguments_of_a_block_for_the_first_copies():
    ends, table = torch.tensor([0, 2, 4, 6, 8, 10, 12], dtype=torch.int32), torch.arange(24.0).view(12, 2)
    mask, other = torch.ones(12, 1, 3, 3), torch.ones(5, 12)
    found = narrowed([(ends, table), mask, other, None, "all"], n_rows=12, kept=4)
    assert found[0][0].tolist() == [0, 2, 4] and torch.equal(found[0][1], table[:4])
    assert len(found[1]) == 4 and found[2] is other and found[3:] == [None, "all"]
    assert narrowed(ends, n_rows=12, kept=12) is ends


def nothing_read(source, sites):
    raise AssertionError("a knockout reads nothing")


def test_a_cut_layer_that_is_not_run_is_told():
    vlm = wrapped("llava_clip")
    encoded = vlm.encode(batch(1))
    made = plan(vlm, encoded, Knockout("image", "image", 1, stream="vision", keep_self=True), nothing_read)
    (copy,) = TowerPass(vlm, encoded, [made], tower_outputs(vlm, encoded)).run()
    assert copy.receipts[0].n_edges > 0
    copy.cut.clear()
    with pytest.raises(ReceiptError, match=r"vision.attention\[1\]: the layer was never reached"):
        copy.receipts  # noqa: B018
