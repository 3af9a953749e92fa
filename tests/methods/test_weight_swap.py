"""Blocks exchanged between checkpoints: identities to the bit, adapters, parts, controls, and the experiment."""

import copy
import dataclasses
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments import layer_swap
from tests.helpers import command, killed_at
from tests.zoo import ZOO
from tests.zoo.batches import batch
from tests.zoo.tiny import picture
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import UsageError
from vlm_mech.interventions.receipt import ReceiptError
from vlm_mech.interventions.trace import run
from vlm_mech.methods.weight_swap import findings as weight_swap_findings
from vlm_mech.methods.weight_swap import study
from vlm_mech.methods.weight_swap.blocks import (
    SCHEDULES,
    Hybrids,
    adapted,
    check_alike,
    checkpoint,
    deltas,
    moved_at_random,
)
from vlm_mech.methods.weight_swap.data import exchanges
from vlm_mech.methods.weight_swap.findings import findings
from vlm_mech.methods.weight_swap.study import (
    AXES,
    GRAFT,
    METRICS,
    OUTSIDE,
    PARENT,
    RANDOM,
    REVERT,
    SECOND,
    is_random,
    random_name,
    swap_blocks,
    two_sides,
)
from vlm_mech.models.vlm import VLM
from vlm_mech.results.result import Result
from vlm_mech.sweeps.recorded_pass import record


def wrapped(family="llava_clip", seed=0):
    model, processor = ZOO[family]("sdpa", seed)
    return VLM(model, processor, name=family, check=False)


def tune_of(vlm, *, only_blocks=True, seed=1):
    """A copy of the model whose decoder blocks (or all of whose weights) were moved a little."""
    model = copy.deepcopy(vlm.model)
    generator = torch.Generator().manual_seed(seed)
    path = vlm.family.llm.path
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(path) or not only_blocks:
                weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    return VLM(model, vlm.processor, name="tune", check=False)


@pytest.fixture(scope="module")
def two():
    base = wrapped()
    return base, tune_of(base)


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_vl", "gemma3", "qwen3_vl", "paligemma"])
def test_none_is_the_base_and_all_is_the_tune_to_the_bit(family):
    base = wrapped(family)
    tune = tune_of(base)
    own, other = checkpoint(base, "base"), checkpoint(tune, "tuned")
    encoded = base.encode(batch(1))
    n_layers = base.n_layers("llm")
    mixed = (other, *[own] * (n_layers - 2), other)
    found = Hybrids(base, own).answers(encoded, [(own,) * n_layers, (other,) * n_layers, mixed])
    assert torch.equal(found[0], record(base, encoded).logits)
    assert torch.equal(found[1], record(tune, encoded).logits)
    # The head rounds otherwise when it is given all positions.
    assert (found[1] - run(tune, encoded).last).abs().max() <= 1e-5 * found[1].abs().max()
    with Hybrids(base, own).in_place(mixed):
        assert torch.equal(found[2], record(base, encoded).logits)
    assert not torch.equal(found[2], found[0])
    assert torch.equal(record(base, encoded).logits, found[0]), "nothing is left behind"


def test_the_rest_of_the_model_counts_too(two):
    base, _ = two
    tune = tune_of(base, only_blocks=False)
    own, other = checkpoint(base, "base"), checkpoint(tune, "tuned")
    encoded = base.encode(batch(1))
    blocks_only = Hybrids(base, own).answers(encoded, [(other,) * 4])[0]
    assert not torch.equal(blocks_only, record(tune, encoded).logits)
    assert torch.equal(Hybrids(tune, other).answers(encoded, [(other,) * 4])[0], record(tune, encoded).logits)


def test_attention_and_mlp_are_taken_with_the_norm_before_them(two):
    base, tune = two
    own, other = checkpoint(base, "base"), checkpoint(tune, "tuned")
    encoded = base.encode(batch(1))
    hybrid = (own, other, own, own)
    for part, names in (("attention", ("self_attn", "input_layernorm")), ("mlp", ("mlp", "post_attention_layernorm"))):
        by_hand = copy.deepcopy(base.model)
        block, theirs = by_hand.get_submodule(base.family.llm.path)[1], other.blocks[1]
        for name in names:
            block.get_submodule(name).load_state_dict(theirs.get_submodule(name).state_dict())
        expected = record(VLM(by_hand, base.processor, check=False), encoded).logits
        hybrids = Hybrids(base, own, part)
        found = hybrids.answers(encoded, [hybrid, (own,) * 4])
        assert torch.equal(found[0], expected)
        assert torch.equal(found[1], record(base, encoded).logits)
        with hybrids.in_place(hybrid):
            assert torch.equal(record(base, encoded).logits, expected)


def test_blocks_that_are_the_same_so_far_run_once(two):
    base, tune = two
    own, other = checkpoint(base, "base"), checkpoint(tune, "tuned")
    calls = []
    hooks = [
        block.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
        for each in (own, other)
        for layer, block in enumerate(each.blocks)
    ]
    hybrids = [tuple(other if layer in each.layers else own for layer in range(4)) for each in exchanges("suffix", 4)]
    Hybrids(base, own).answers(base.encode(batch(1)), hybrids)
    for hook in hooks:
        hook.remove()
    # A pass that finds out how blocks are called ends before the last one.
    assert [calls.count(layer) - (layer < 3) for layer in range(4)] == [2, 3, 4, 4]


def test_schedules():
    layers = {name: [each.layers for each in exchanges(name, 4, size=3)] for name in SCHEDULES}
    assert layers["suffix"] == [(0, 1, 2, 3), (1, 2, 3), (2, 3), (3,)]
    assert layers["prefix"] == [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]
    assert layers["single"] == [(0,), (1,), (2,), (3,)]
    assert layers["window"] == [(0, 1), (0, 1, 2), (1, 2, 3), (2, 3)]
    with pytest.raises(UsageError, match="schedule 'middle' is not known"):
        exchanges("middle", 4)


def test_the_control_moves_every_weight_as_far_in_another_direction(two):
    own, other = checkpoint(two[0], "base"), checkpoint(two[1], "tuned")
    drawn_anew = moved_at_random(own, other, seed=3)
    for one, theirs, control in zip(own.blocks, other.blocks, drawn_anew.blocks, strict=True):
        for (name, weight), moved, drawn in zip(
            one.named_parameters(), theirs.parameters(), control.parameters(), strict=True
        ):
            assert (drawn - weight).norm().item() == pytest.approx((moved - weight).norm().item(), rel=1e-3), name
            cosine = torch.cosine_similarity((drawn - weight).flatten(), (moved - weight).flatten(), dim=0)
            assert weight.numel() < 500 or abs(cosine) < 0.2
    assert deltas(own, drawn_anew) == pytest.approx(deltas(own, other), rel=1e-3) and min(deltas(own, other)) > 0.05


def test_several_random_changes_are_of_equal_size_and_drawn_apart(two):
    one, more = two_sides(*two), two_sides(*two, n_random=3, second=tune_of(two[0], seed=5))
    names = [random_name(number) for number in range(3)]
    assert names[0] == RANDOM and len(set(names)) == 3 and all(map(is_random, names)) and not is_random(PARENT)
    for direction, donors in more.donors.items():
        assert [name for name in donors if is_random(name)] == names
        own = more.recipients[direction].own
        weights = [torch.cat([w.flatten() for w in donors[name].blocks[0].parameters()]) for name in names]
        before = torch.cat([w.flatten() for w in own.blocks[0].parameters()])
        first = torch.cat([w.flatten() for w in one.donors[direction][RANDOM].blocks[0].parameters()])
        assert torch.equal(first, weights[0]), "the first is the one there always was"
        for at, name in enumerate(names):
            assert more.moved[direction, name] == pytest.approx(more.moved[direction, PARENT], rel=1e-3)
            for other in weights[at + 1 :]:
                assert abs(torch.cosine_similarity(weights[at] - before, other - before, dim=0)) < 0.1
    table = swap_blocks(more, some_pairs(2), exchanges("single", 4))
    assert set(table["donor"]) == {PARENT, SECOND, *names}
    with pytest.raises(UsageError, match="n_random is 0; at least 1 random change is needed"):
        two_sides(*two, n_random=0)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter of two kinds of maps, its weights drawn so that it does something."""
    peft = pytest.importorskip("peft")
    base = wrapped()
    model = base.model
    wanted = r".*language_model.layers.\d+.(self_attn.q_proj|mlp.down_proj)"
    with_lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=wanted))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in with_lora.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("adapter")
    with_lora.save_pretrained(folder)
    merged = VLM(with_lora.merge_and_unload(), base.processor, check=False)
    return folder, merged


def test_an_adapter_is_switched_layer_by_layer(adapter):
    folder, merged = adapter
    base = wrapped()
    encoded = base.encode(batch(1))
    plain, tuned = record(base, encoded).logits, record(merged, encoded).logits
    off, on = adapted(base, str(folder))
    for own in (off, on):
        found = Hybrids(base, own).answers(encoded, [(off,) * 4, (on,) * 4, (off, on, off, off)])
        assert torch.equal(found[0], plain)
        assert (found[1] - tuned).abs().max() <= 1e-5 and (tuned - plain).abs().max() > 1e-3
        assert not torch.equal(found[2], plain) and not torch.equal(found[2], found[1])
    # Of the MLP alone, the attention's adapter stays as the model has it.
    by_part = [Hybrids(base, off, part).answers(encoded, [(on,) * 4])[0] for part in ("attention", "mlp")]
    both = [Hybrids(base, on, part).answers(encoded, [(off,) * 4])[0] for part in ("mlp", "attention")]
    for one, other in zip(by_part, both, strict=True):
        assert (one - other).abs().max() <= 1e-6
    assert not torch.equal(*by_part)
    assert min(deltas(off, on)) > 0 and deltas(off, on) == pytest.approx(deltas(off, checkpoint(merged, "m")), rel=1e-3)
    assert deltas(off, moved_at_random(off, on, seed=0)) == pytest.approx(deltas(off, on), rel=1e-3)
    assert torch.equal(record(base, encoded).logits, plain), "it is left off"


def test_an_adapter_outside_the_decoder_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    base = wrapped()
    model = base.model
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["linear_1"])).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="which is not a part of a decoder block"):
        adapted(wrapped(), str(tmp_path))


def test_an_adapter_of_the_attention_alone_has_no_mlp_to_exchange(tmp_path):
    """The usual adapter moves query and value maps; that the logits stay is then no failure of an exchange of MLPs."""
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(
        wrapped().model, peft.LoraConfig(r=2, target_modules=r".*language_model.layers.[12].self_attn.v_proj")
    )
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    made.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="the mlp parts of the decoder blocks of .* nothing to patch"):
        two_sides(wrapped(), str(tmp_path), part="mlp")
    for part in ("attention", "block"):
        sides = two_sides(wrapped(), str(tmp_path), part=part)
        moved = sides.moved[GRAFT, PARENT]
        assert [each > 0 for each in moved] == [False, True, True, False]
        table = swap_blocks(sides, some_pairs(), exchanges("single", 4))
        grafted = table[(table["direction"] == GRAFT) & (table["donor"] == PARENT)]
        changed = (grafted["lead"] != grafted["lead_baseline"]).groupby(grafted["layer"]).any()
        assert changed.tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda name, weight: (name, weight.repeat(2, 1)), "size mismatch"),
        (lambda name, weight: (name.replace("layers.3", "layers.7"), weight), "only one of them has .*layers"),
        (lambda name, weight: (name, weight) if "layers.3" not in name else (), "only one of them has .*layers.3"),
        (lambda name, weight: (name.replace("language_model", "decoder"), weight), "only one of them has"),
    ],
    ids=["wider", "deeper", "shallower", "named otherwise"],
)
def test_an_adapter_of_another_model_is_one_line(change, told, adapter, tmp_path):
    folder, _ = adapter
    weights = dict(each for name, weight in load_file(folder / "adapter_model.safetensors").items()
                   if (each := change(name, weight)))  # fmt: skip
    save_file(weights, tmp_path / "adapter_model.safetensors")
    shutil.copy(folder / "adapter_config.json", tmp_path)
    with pytest.raises(UsageError, match=f"does not fit llava_clip: .*{told}") as caught:
        adapted(wrapped(), str(tmp_path))
    assert "\n" not in str(caught.value)


def test_what_is_no_adapter_of_safetensors_is_one_line(adapter, tmp_path):
    shutil.copy(adapter[0] / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UsageError, match="has no adapter_model.safetensors; no other format is read"):
        adapted(wrapped(), str(tmp_path))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="does not fit llava_clip"):
        adapted(wrapped(), str(tmp_path))


def test_a_second_tune_may_be_an_adapter(adapter):
    """The same adapter in a model of its own puts in what is there already."""
    folder, _ = adapter
    base, other = wrapped(), wrapped()
    second = dataclasses.replace(adapted(other, str(folder))[1], name="second")
    sides = two_sides(base, str(folder), second=second)
    result = Result("b", swap_blocks(sides, some_pairs(2), exchanges("suffix", 4)), AXES, METRICS)
    table = result.table[(result.table["donor"] == SECOND)]
    assert len(table) == 2 * 4 and set(table["direction"]) == {REVERT}
    assert np.allclose(table["lead"], table["lead_baseline"], atol=1e-5)
    moved = result.table[(result.table["donor"] == PARENT) & (result.table["direction"] == REVERT)]
    assert (moved["lead"] - moved["lead_baseline"]).abs().max() > 1e-3
    (told,) = [each for each in findings(result) if each.startswith(f"{REVERT}, with blocks from {SECOND}: mean leads")]
    leads = table.groupby("layer")["lead"].mean()
    assert f"range from {leads.min():+.2f} to {leads.max():+.2f}; unpatched" in told


def some_pairs(n=4):
    pairs = [
        Pair(f"p{number}", picture(number), picture(50 + number), "what colour is the circle?", "red", "blue")
        for number in range(n)
    ]
    return Pairs("some", tuple(pairs))


def test_a_table_of_exchanges_has_all_cells_and_its_identities(two):
    base, tune = two
    sides = two_sides(base, tune, second=tune_of(base, seed=5))
    table = swap_blocks(sides, some_pairs(), [*exchanges("suffix", 4), *exchanges("single", 4)])
    result = Result("blocks", table, study.AXES, study.METRICS)
    lead = result.summary("lead").set_index(list(study.AXES))["mean"]
    assert set(table["donor"]) == {PARENT, RANDOM, SECOND} and len(lead) == 8 * 5 + 2
    own = {side: table[table["direction"] == side]["lead_baseline"].iloc[:4].mean() for side in (REVERT, GRAFT)}
    # As the two differ in their blocks alone, all blocks of the other are the other, and the rest changes nothing.
    assert lead[REVERT, "suffix", PARENT, 0] == pytest.approx(own[GRAFT], abs=1e-12)
    assert lead[GRAFT, "suffix", PARENT, 0] == pytest.approx(own[REVERT], abs=1e-12)
    for side in (REVERT, GRAFT):
        assert lead[side, OUTSIDE, PARENT, -1] == pytest.approx(own[side], abs=1e-12)
        assert lead[side, "suffix", PARENT, 3] == lead[side, "single", PARENT, 3]
    assert any(each.startswith("the fine-tuned model unpatched") for each in weight_swap_findings.findings(result))


def test_an_exchange_that_does_nothing_is_caught(two, monkeypatch):
    sides = two_sides(*two)
    monkeypatch.setattr(Hybrids, "_put_in", lambda self, layer, source: nullcontext(self.own.blocks[layer]))
    with pytest.raises(ReceiptError, match="the blocks differ, but the logits say otherwise"):
        swap_blocks(sides, some_pairs(2), exchanges("single", 4))


def test_models_that_do_not_fit_are_refused(two):
    with pytest.raises(UsageError, match="nothing to patch"):
        two_sides(two[0], wrapped())
    with pytest.raises(UsageError, match="are not of one architecture: only one of them has"):
        check_alike(two[0], wrapped("qwen2_vl"))


def test_the_experiment_runs_and_resumes(tmp_path, monkeypatch, capsys):
    given = ["--swap", "weights", "--n", "8", "--batch", "4", "--schedules", "suffix", "prefix"]
    assert command(layer_swap, *given, "--out", tmp_path / "one") == 0
    assert "the fine-tuned model unpatched gives the true answer in 1.000" in capsys.readouterr().out
    killed_at(monkeypatch, study, "swap_blocks", 2)
    assert command(layer_swap, *given, "--out", tmp_path / "two") == 130
    assert command(layer_swap, *given, "--out", tmp_path / "two", "--resume") == 0
    for name in ("result.parquet", "summary.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert command(layer_swap, "--swap", "weights", "--dry-run") == 2
    assert command(layer_swap, "--swap", "weights", "--tuned", "organism", "--n", "2", "--out", tmp_path / "three") == 2
    assert "nothing to patch" in capsys.readouterr().err
