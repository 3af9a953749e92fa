"""The load-time check, its structural part on the meta device, and the command that prints it."""

import dataclasses
import runpy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from tests.helpers import some_long
from tests.zoo import ZOO
from tests.zoo.tiny import tiny_model, tiny_processor
from vlm_mech.architectures import families
from vlm_mech.architectures.families import FAMILIES, LLAVA, family_of
from vlm_mech.benchmark.model_shapes import Tower, build, geometry
from vlm_mech.checks import asked as checks
from vlm_mech.checks.asked import between, example
from vlm_mech.checks.finding import refuse_unless_all_hold
from vlm_mech.checks.structure import find_structure
from vlm_mech.checks.vlm import find_vlm
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.image_layout import flattened
from vlm_mech.interventions.module_hooks import left_out
from vlm_mech.models.loading import skeleton
from vlm_mech.models.vlm import VLM

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
CLIP_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip


def llava_15_7b() -> hf.PreTrainedConfig:
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP_LARGE), text_config=hf.LlamaConfig(**LLAMA_7B, vocab_size=32064)
    )


def llava_16_mistral_7b() -> hf.PreTrainedConfig:
    text = hf.MistralConfig(**{**LLAMA_7B, "intermediate_size": 14336}, num_key_value_heads=8, vocab_size=32064)
    return hf.LlavaNextConfig(vision_config=hf.CLIPVisionConfig(**CLIP_LARGE), text_config=text)


def qwen_25_vl_3b() -> hf.PreTrainedConfig:
    text = {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
        "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    return hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision)


def instructblip_vicuna_7b() -> hf.PreTrainedConfig:
    vision = {
        "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14,
    }  # fmt: skip
    text = hf.LlamaConfig(**LLAMA_7B, vocab_size=32002).to_dict()
    return hf.InstructBlipConfig(vision_config=vision, qformer_config={"vocab_size": 30523}, text_config=text)


@pytest.mark.parametrize(
    ("config", "n_billions", "n_layers", "n_heads"),
    [
        (llava_15_7b, 7.06, 32, 32),
        (llava_16_mistral_7b, 7.57, 32, 32),
        (qwen_25_vl_3b, 3.75, 36, 16),
        (instructblip_vicuna_7b, 7.91, 32, 32),
    ],
)
def test_full_size_configurations_have_the_structure_without_weights(config, n_billions, n_layers, n_heads):
    model = skeleton(config())
    assert all(parameter.is_meta for parameter in model.parameters())
    findings = list(find_structure(model))
    assert [finding for finding in findings if not finding.holds] == []
    assert any(f"{n_layers} at " in finding.detail for finding in findings)
    assert any(f"{n_heads} heads of 128" in finding.detail for finding in findings)
    # The published sizes; where head and embeddings are tied in the published checkpoint, both count here.
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(n_billions, rel=0.1)


# That all do is seen where the table of families is made.
@pytest.mark.parametrize("family", some_long(ZOO, ("llava_clip", "qwen3_vl", "gemma3", "blip2")))
def test_every_family_passes_and_every_finding_has_a_number(family):
    findings = refuse_unless_all_hold(family, find_vlm(VLM(*ZOO[family]("sdpa", 0), check=False)))
    assert len(findings) >= 45 and len({finding.name for finding in findings}) == len(findings)
    assert all(finding.detail for finding in findings)


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_5_vl"])
def test_the_check_runs_the_decoder_over_two_pictures_and_a_few_words(family):
    vlm = VLM(*ZOO[family]("sdpa", 0), check=False)
    n_image = len(vlm.encode([example(vlm)]).rows[0].image)
    seen = {"vision": 0, "llm": []}
    tower, decoder = (vlm.model.get_submodule(f"{vlm.blocks(stream).path}.0") for stream in ("vision", "llm"))

    def count(module, given, named, out):
        states = given[0] if given else named["hidden_states"]
        if module is decoder:
            seen["llm"].append(tuple(states.shape[:2]))
        else:
            seen["vision"] += 1

    hooks = [module.register_forward_hook(count, with_kwargs=True) for module in (tower, decoder)]
    assert all(finding.holds for finding in find_vlm(vlm))
    for hook in hooks:
        hook.remove()
    *pictures, (n_rows, n_words) = seen["llm"]
    assert seen["vision"] <= 4 and len(pictures) == 2 and {rows for rows, _ in pictures} == {1}
    assert n_rows <= 10 and n_words <= pictures[0][1] - n_image


@pytest.mark.parametrize("family", some_long(ZOO, ("llava_clip", "qwen3_vl", "gemma3", "mistral3")))
def test_a_deep_decoder_runs_its_first_blocks_over_a_picture_and_all_over_words(family, monkeypatch):
    monkeypatch.setattr(checks, "DEEP", 1)
    vlm = VLM(*ZOO[family]("sdpa", 0), check=False)
    depth, n_layers = checks.shallow(vlm), vlm.n_layers("llm")
    if depth is None or depth == n_layers or checks.words(vlm) is None:
        # Too shallow, or nothing can be asked without a picture: all is run over one.
        assert family in ("gemma3", "paligemma", "instructblip", "blip2")
        return
    lengths: dict[int, list[int]] = {0: [], n_layers - 1: []}
    for layer, seen in lengths.items():
        block = vlm.model.get_submodule(f"{vlm.blocks('llm').path}.{layer}")
        block.register_forward_hook(
            lambda _, given, named, out, seen=seen: seen.append(
                (given[0] if given else named["hidden_states"]).shape[1]
            ),
            with_kwargs=True,
        )
    findings = refuse_unless_all_hold(family, find_vlm(vlm))
    assert any(f"what llm[{depth}] receives" in finding.name for finding in findings)
    assert len({finding.name for finding in findings}) == len(findings) >= 45
    n_picture = max(lengths[0])
    assert (
        lengths[0].count(n_picture) == 2
        and n_picture not in lengths[n_layers - 1]
        and len(lengths[n_layers - 1]) in (2, 3)
    )


@pytest.mark.parametrize("family", some_long(ZOO, ("llava_clip", "qwen2_5_vl", "llava_next_mistral", "blip2")))
def test_of_a_deep_tower_equal_rows_are_computed_once(family, monkeypatch):
    monkeypatch.setattr(checks, "DEEP", 1)
    vlm = VLM(*ZOO[family]("sdpa", 0), check=False)
    assert checks.has_deep_tower(vlm)
    inside = vlm.model.get_submodule(
        f"{vlm.family.vision.path}.0.{vlm.family.vision.attention}.{vlm.family.vision.out}"
    )
    sizes: list[int] = []
    hook = inside.register_forward_hook(lambda _, given, out: sizes.append(out.numel()))
    with torch.no_grad():
        vlm.model(**vlm.encode([example(vlm)]).inputs)
    one = sizes.pop()
    assert all(finding.holds for finding in find_vlm(vlm))
    hook.remove()
    # Writes in the first blocks are rows of one pass, parted at the second block but where a mask spans all pictures.
    assert sum(size > 4 * one for size in sizes) == (vlm.family.layout is flattened)


@pytest.mark.parametrize("shape", ["llava15", "next", "qwen"])
def test_of_deep_stacks_the_blocks_in_between_are_not_run(shape):
    tower = Tower(16, 64, 4, 128)
    small = dataclasses.replace(geometry(shape, width=128), n_layers=16, intermediate=128, tower=tower)
    vlm = build(small)
    ran: dict[str, Counter[int]] = {"vision": Counter(), "llm": Counter()}
    hooks = []
    for stream, seen in ran.items():
        for layer in range(16):
            inside = vlm.model.get_submodule(f"{vlm.blocks(stream).path}.{layer}.{vlm.blocks(stream).mlp}")
            hooks.append(inside.register_forward_hook(lambda *_, seen=seen, layer=layer: seen.update([layer])))
    findings = refuse_unless_all_hold(shape, find_vlm(vlm))
    for hook in hooks:
        hook.remove()
    assert len(findings) >= 45
    for stream, seen in ran.items():
        others = {vlm.vision_depth - 1, 15} if stream == "vision" else {2, 15}
        assert set(seen) == {0, 1, 8, 9} | others, f"{stream}: {seen}"
    # Afterwards all of them are run again.
    plain = vlm.model(**vlm.encode([example(vlm)]).inputs).logits
    with left_out(between(vlm, "llm", (0, 15))):
        assert not torch.equal(plain, vlm.model(**vlm.encode([example(vlm)]).inputs).logits)
    assert torch.equal(plain, vlm.model(**vlm.encode([example(vlm)]).inputs).logits)


def test_a_block_of_another_kind_in_between_is_run():
    vlm = build(dataclasses.replace(geometry("llava15", width=128), n_layers=16, intermediate=128))
    blocks = vlm.model.get_submodule(vlm.blocks("llm").path)
    blocks[5].__class__ = type("Other", (type(blocks[5]),), {})
    assert blocks[5] not in between(vlm, "llm", (0, 15)) and blocks[6] in between(vlm, "llm", (0, 15))
    n_passes = [0]

    def differs(_, __, out):
        n_passes[0] += 1
        return out + n_passes[0] / 8

    blocks[5].register_forward_hook(differs)
    wrong = [finding.name for finding in find_vlm(vlm) if not finding.holds]
    assert "logits equal the plain forward" in wrong


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_5_vl"])
def test_a_tower_read_through_the_wrong_tokens_is_found_where_equal_rows_are_computed_once(family, monkeypatch):
    monkeypatch.setattr(checks, "DEEP", 1)
    vlm = VLM(*ZOO[family]("sdpa", 0), check=False)
    projector = vlm.model.get_submodule(vlm.family.projector)
    # Token by token, the projector's output goes to the next place.
    hook = projector.register_forward_hook(lambda _, given, out: out.roll(1, dims=-2))
    wrong = [finding.name for finding in find_vlm(vlm) if not finding.holds]
    hook.remove()
    assert sum("make it and no other" in name for name in wrong) >= 2


@pytest.mark.parametrize("layer", [1, 3])
def test_what_differs_from_the_plain_forward_is_found_below_and_above_what_a_picture_runs(layer, monkeypatch):
    monkeypatch.setattr(checks, "DEEP", 1)
    vlm = VLM(*ZOO["llava_clip"]("sdpa", 0), check=False)
    assert checks.shallow(vlm) == 2
    block, n_passes = vlm.model.get_submodule(f"{vlm.blocks('llm').path}.{layer}"), [0]

    def differs(_, given, named, out):
        n_passes[0] += 1
        return out + n_passes[0] / 8 if isinstance(out, torch.Tensor) else (out[0] + n_passes[0] / 8, *out[1:])

    block.register_forward_hook(differs, with_kwargs=True)
    wrong = [finding.name for finding in find_vlm(vlm) if not finding.holds]
    expected = "over an image, what llm[2] receives equals the plain forward" if layer == 1 else None
    assert "logits equal the plain forward" in wrong and (expected is None or expected in wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector": "model.projector"}, "projector is there"),
        ({"head": "model.language_model.embed_tokens2"}, "head is there"),
        ({"vision": dataclasses.replace(LLAVA.vision, out="o_proj")}, "vision parts of every block: missing: 0.self"),
        ({"llm": dataclasses.replace(LLAVA.llm, path="model.language_model.blocks")}, "llm blocks are there: 0 at"),
        ({"merge": lambda config: config.scale_factor}, "facts of the configuration"),
    ],
)
def test_a_wrong_record_is_refused_by_its_structure(monkeypatch, change, message):
    monkeypatch.setattr(families, "FAMILIES", (dataclasses.replace(LLAVA, **change),))
    with pytest.raises(WorkError, match=message):
        VLM(tiny_model(), tiny_processor())


def test_heads_that_do_not_fit_the_widths_are_refused():
    model = tiny_model()
    model.config.text_config.num_attention_heads = 5
    wrong = [finding for finding in find_structure(model) if not finding.holds]
    assert [finding.name for finding in wrong] == ["llm heads and widths fit"]
    assert "32 to 32 for width 32, 5 heads" in wrong[0].detail


def failing(family: str, **change) -> list[str]:
    vlm = VLM(*ZOO[family]("sdpa", 0), check=False)
    vlm.family = dataclasses.replace(vlm.family, **change)
    return [finding.name for finding in find_vlm(vlm) if not finding.holds]


def test_wrong_image_layouts_are_found():
    from vlm_mech.inputs.image_layout import packed, tiles

    assert any("make it and no other" in name for name in failing("qwen2_5_vl", layout=packed))
    swapped = failing("llava_clip", layout=lambda batch: [transposed(image) for image in tiles(batch)])
    assert any("sees its pixels" in name for name in swapped) or any("make it" in name for name in swapped)


def transposed(image):
    view = image.views[0]
    order = torch.arange(len(view.slots)).reshape(view.grid).T.flatten().numpy()
    return dataclasses.replace(image, views=(dataclasses.replace(view, patches=view.patches[order]),))


def test_unknown_architectures_name_the_nearest_and_the_way_to_add_one():
    for model_type, nearest in (("llava_next_video", "llava_next"), ("qwen2_9_vl", "qwen2_5_vl|qwen2_vl")):
        config = SimpleNamespace(model_type=model_type, vision_config=object())
        with pytest.raises(UsageError, match=rf"nearest: '({nearest})'.*Adding a family"):
            family_of(config)
    with pytest.raises(UsageError, match="has no vision encoder"):
        family_of(hf.LlamaConfig())


def test_records_are_told_apart():
    assert len({family.model_type for family in FAMILIES}) == len({family.name for family in FAMILIES}) == len(FAMILIES)
    in_zoo = {family_of(ZOO[name]("sdpa", 0)[0].config).name for name in ZOO}
    assert in_zoo == {family.name for family in FAMILIES}, "every record is tried"


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python -m vlm_mech.models.check` in this process."""

    def run(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr("sys.argv", ["check", *arguments])
        capsys.readouterr()  # what was printed before is not the command's
        try:
            runpy.run_module("vlm_mech.models.check", run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code
        told = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=told.out, stderr=told.err)

    return run


def test_the_command_prints_one_line_a_finding(tmp_path, command):
    whole = command("organism")
    assert whole.returncode == 0 and "logits equal the plain forward" in whole.stdout
    assert whole.stdout.count("\nholds ") >= 45 and "findings hold" in whole.stdout
    contrastive = command("clip")
    assert contrastive.returncode == 0 and "similarities equal the plain forward" in contrastive.stdout
    model = tiny_model()
    with torch.no_grad():
        model.model.language_model.layers[2].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    dead = command(str(tmp_path))
    assert dead.returncode == 1 and dead.stderr.startswith("error: 1 of ") and dead.stderr.count("\n") == 1
    assert "FAILS  zero llm.mlp_out[2]" in dead.stdout
    assert command(str(tmp_path), "--structure").returncode == 0


def test_the_command_refuses_what_is_no_model(tmp_path, command):
    gone = command(str(tmp_path / "none"))
    assert gone.returncode == 2 and gone.stderr.startswith("error: model") and gone.stderr.count("\n") == 1
    hf.LlamaConfig().save_pretrained(tmp_path)
    text_only = command(str(tmp_path), "--structure")
    assert text_only.returncode == 2 and "no vision encoder" in text_only.stderr
