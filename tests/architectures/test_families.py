"""Every family through one wrapper, on tiny random-weight models of the real classes with their real processors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from tests.zoo import ALL_AND_EAGER, FEW, FEW_AND_EAGER, ONE_IMAGE, ZOO, families_table, of_each_kind
from tests.zoo import FAMILIES as OF_EACH_KIND
from tests.zoo.batches import QUESTIONS, SHAPES, batch, wrapped
from tests.zoo.tiny import picture, tiny_config, tiny_processor
from vlm_mech.architectures.families import FAMILIES
from vlm_mech.architectures.site import BLOCK_POINTS, Site
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt, render
from vlm_mech.inputs.span import OneImage, Patches
from vlm_mech.interventions.specification import Ablate, Knockout, Replace, Steer
from vlm_mech.interventions.trace import generate, read, run
from vlm_mech.methods.layer_swap.data import default_spans, swap_sites
from vlm_mech.methods.layer_swap.study import swap_states
from vlm_mech.models.vlm import VLM


def plain(vlm: VLM, encoded) -> torch.Tensor:
    with torch.no_grad():
        return vlm.model(**encoded.inputs).logits


@pytest.mark.parametrize(("family", "attn"), ALL_AND_EAGER)
def test_no_edit_equals_hugging_face_exactly(family, attn):
    vlm = wrapped(family, attn)
    encoded = vlm.encode(batch())
    assert (encoded.inputs["attention_mask"] == 0).any(), "the batch must hold padding"
    assert (run(vlm, encoded).logits - plain(vlm, encoded)).abs().max() == 0.0


@pytest.mark.parametrize("family", ZOO)
def test_a_prompt_answers_the_same_alone_and_in_a_padded_batch(family):
    vlm = wrapped(family)
    together = run(vlm, batch()).last
    for example, prompt in enumerate(batch()):
        assert (run(vlm, [prompt]).last[0] - together[example]).abs().max() <= 2e-5


@pytest.mark.parametrize("family", FEW)
def test_back_ends_agree_with_and_without_knockouts(family):
    edits = [None, Knockout("last", "all", range(4), keep_self=True), Knockout("question", "image", 1)]
    edits.append(Knockout("image", "image", (1, 2), stream="vision", keep_self=True))
    for edit in edits:
        sdpa, eager = (run(wrapped(family, attn), batch(), edit).last for attn in ("sdpa", "eager"))
        assert (sdpa - eager).abs().max() <= 1e-5 * max(1.0, sdpa.abs().max().item())


@pytest.mark.parametrize("family", FEW)
def test_residual_sites_equal_what_plain_hooks_see(family):
    vlm = wrapped(family)
    encoded = vlm.encode(batch())
    seen, hooks = {}, []
    for stream in ("vision", "llm"):
        for layer in range(vlm.n_layers(stream)):
            block = vlm.model.get_submodule(f"{vlm.blocks(stream).path}.{layer}")
            keep = lambda module, given, out, at=(stream, layer): seen.update({at: (given[0], out)})  # noqa: E731
            hooks.append(block.register_forward_hook(keep))
    plain(vlm, encoded)
    for hook in hooks:
        hook.remove()
    for (stream, layer), (given, out) in seen.items():
        pair = (Site(f"{stream}.resid_pre", layer), Site(f"{stream}.resid_post", layer))
        states = read(vlm, encoded, pair)
        for site, expected in zip(pair, (given, out), strict=True):
            expected = expected[0] if isinstance(expected, tuple) else expected
            assert torch.equal(states[site], expected.reshape(states[site].shape))


@pytest.mark.parametrize(("family", "attn"), FEW_AND_EAGER)
def test_every_site_is_written_with_effect_or_a_reason(family, attn):
    vlm = wrapped(family, attn)
    encoded = vlm.encode(batch())
    baseline = run(vlm, encoded)
    every = [Site("projector.in"), Site("projector.out")]
    for stream in ("vision", "llm"):
        every += [Site(f"{stream}.{point}", layer) for layer in range(vlm.n_layers(stream)) for point in BLOCK_POINTS]
    for site in every:
        receipt = run(vlm, encoded, Ablate(site, "image"), baseline=baseline).receipts[0]
        assert receipt.change > 0
        assert (receipt.pass_readout_change > 0) == receipt.reaches, receipt
        assert receipt.reaches or receipt.reason


@pytest.mark.parametrize(("family", "attn"), FEW_AND_EAGER)
def test_cut_attention_is_exactly_zero_in_both_towers(family, attn):
    vlm = wrapped(family, attn)
    encoded = vlm.encode(batch())
    baseline = run(vlm, encoded)
    for layer in vlm.llm_layers:
        for heads in (None, (1, 3)):
            edit = Knockout("question", "all", layer, heads=heads, keep_self=True)
            receipt = run(vlm, encoded, edit, baseline=baseline).receipts[0]
            assert receipt.blocked_mass == 0.0 and receipt.natural_mass > 0 and receipt.n_edges > 0
            assert (receipt.pass_readout_change > receipt.tolerance) == receipt.reaches
    for layer in vlm.vision_layers:
        for heads in (None, (1, 3)):
            edit = Knockout("image", "image", layer, heads=heads, stream="vision", keep_self=True)
            receipt = run(vlm, encoded, edit, baseline=baseline).receipts[0]
            assert receipt.blocked_mass == 0.0 and receipt.natural_mass > 0 and receipt.n_edges > 0
            assert (receipt.pass_readout_change > receipt.tolerance) == receipt.reaches


def image_prompts(family: str) -> dict[str, Prompt]:
    """Pictures of every shape, and two of them in one prompt where the family takes two."""
    prompts = {name: Prompt(QUESTIONS[0], picture(3, *size)) for name, size in SHAPES.items()}
    if family not in ONE_IMAGE:
        two = [picture(4, *SHAPES["wide"]), picture(5, *SHAPES["square"])]
        prompts["two"] = Prompt(QUESTIONS[0], two)
    return prompts


@pytest.mark.parametrize("family", ZOO)
def test_spans_agree_with_the_processors_ids_and_the_models_features(family):
    vlm = wrapped(family)
    for prompt in image_prompts(family).values():
        encoded = vlm.encode(prompt)
        row, ids = encoded.rows[0], encoded.inputs["input_ids"][0]
        assert encoded.positions("image") == tuple((ids == vlm.config.image_token_id).nonzero().flatten().tolist())
        tokens = [row.tokens[position] for position in encoded.positions("question")]
        assert [token.lower() for token in tokens] == ["what", "colour", "is", "the", "circle", "?"]
        parts = [
            encoded.positions(span) for span in ("system", "image", "question", "answer_prompt") if has(encoded, span)
        ]
        if has(encoded, "separator"):
            parts.append(encoded.positions("separator"))
        assert sorted(position for part in parts for position in part) == list(encoded.positions("all"))
        for image, picture_ in enumerate(row.images):
            assert encoded.positions(OneImage(image)) == picture_.positions
        if hasattr(vlm.model, "get_image_features") and family not in ONE_IMAGE:
            names = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask", "batch_num_images")
            given = {name: value for name, value in encoded.inputs.items() if name in names}
            with torch.no_grad():
                features = vlm.model.get_image_features(**given).pooler_output
            counted = sum(each.reshape(-1, each.shape[-1]).shape[0] for each in features)
            assert counted == len(row.image)


def has(encoded, span: str) -> bool:
    try:
        return bool(encoded.positions(span))
    except UsageError:
        return False


@pytest.mark.parametrize("family", of_each_kind(name for name in ZOO if name not in ONE_IMAGE))
def test_patches_become_exactly_their_tokens(family):
    """Each token of a view has a number; for each binary digit, only patches of tokens that have it are moved."""
    vlm = wrapped(family)
    into, out = Site("vision.resid_post", vlm.vision_depth - 1), Site("llm.resid_pre", 0)
    vector = torch.randn(vlm.width(into), generator=torch.Generator().manual_seed(0))
    for prompt in image_prompts(family).values():
        encoded = vlm.encode(prompt)
        before = read(vlm, encoded, out)[out][0]
        for image, each in enumerate(encoded.rows[0].images):
            for number, view in enumerate(each.layout.views):
                mixed = (view.given < 0).any()
                for digit in range(len(view.slots).bit_length()):
                    chosen = [token for token in range(len(view.slots)) if token >> digit & 1]
                    cells = tuple((token // view.grid[1], token % view.grid[1]) for token in chosen)
                    if not cells:
                        continue
                    span = Patches(cells, image=image, view=number)
                    after = read(vlm, encoded, out, Steer(into, span, vector=vector))[out][0]
                    moved = set(((after - before).norm(dim=-1) > 1e-5).nonzero().flatten().tolist())
                    expected = set(encoded.positions(span))
                    assert moved >= expected if mixed else moved == expected


def test_interpolated_tokens_are_mixed_from_exactly_their_patches():
    """Moving the patches of one token of a shrunk mosaic moves just those tokens that share one of them."""
    vlm = wrapped("llava_onevision")
    encoded = vlm.encode(Prompt(QUESTIONS[0], picture(3, *SHAPES["wide"])))
    into, out = Site("vision.resid_post", vlm.vision_depth - 1), Site("llm.resid_pre", 0)
    vector = torch.randn(vlm.width(into), generator=torch.Generator().manual_seed(0))
    before = read(vlm, encoded, out)[out][0]
    image = encoded.rows[0].images[0]
    view = image.layout.views[1]
    assert (view.given < 0).all()
    sources = [{tuple(cell) for cell in token} for token in view.patches.tolist()]
    for token, own in enumerate(sources):
        span = Patches((divmod(token, view.grid[1]),), view=1)
        after = read(vlm, encoded, out, Steer(into, span, vector=vector))[out][0]
        moved = set(((after - before).norm(dim=-1) > 1e-5).nonzero().flatten().tolist())
        sharing = [slot for slot, others in zip(view.slots, sources, strict=True) if own & others]
        assert moved == {image.positions[slot] for slot in sharing}


@pytest.mark.parametrize("family", of_each_kind(name for name in ZOO if name not in ONE_IMAGE))
def test_pixels_of_a_token_are_what_its_patches_see(family):
    """Patch -> pixel box -> patch: a picture changed inside a token's box alone moves that token's patches most."""
    vlm = wrapped(family)
    site = Site("vision.resid_pre", 0)
    for name, size in SHAPES.items():
        if name == "tiny":
            continue
        dark = Image.new("RGB", size, (90, 90, 90))
        encoded = vlm.encode(Prompt(QUESTIONS[0], dark))
        before = read(vlm, encoded, site)[site]
        for number, view in enumerate(encoded.rows[0].images[0].layout.views):
            boxes = encoded.boxes(view=number)
            assert len(boxes) == len(view.slots)
            for token in range(0, len(view.slots), 3):
                box = boxes[token]
                pixels = np.array(dark)
                pixels[round(box.top) : round(box.bottom), round(box.left) : round(box.right)] = 255
                after = read(vlm, vlm.encode(Prompt(QUESTIONS[0], Image.fromarray(pixels))), site)[site]
                change = (after - before).norm(dim=-1)
                of_tokens = [
                    sum(change[cell[0], cell[1]].item() for cell in sources if cell[0] >= 0)
                    for sources in view.patches.tolist()
                ]
                assert int(np.argmax(of_tokens)) == token


@pytest.mark.parametrize("family", of_each_kind(name for name in ZOO if name not in (*ONE_IMAGE, "llava_onevision")))
def test_boxes_of_an_image_do_not_depend_on_the_others(family):
    vlm = wrapped(family)
    wide, tall = picture(1, *SHAPES["wide"]), picture(2, *SHAPES["tall"])
    both = vlm.encode(Prompt(QUESTIONS[0], [wide, tall]))
    for image, alone in enumerate((wide, tall)):
        single = vlm.encode(Prompt(QUESTIONS[0], alone))
        for view in range(len(single.rows[0].images[0].layout.views)):
            assert both.boxes(image=image, view=view) == single.boxes(view=view)


MERGED = [
    name for name in ZOO if name.startswith(("qwen", "glm", "gemma3", "idefics3", "smolvlm", "internvl", "mistral3"))
]


@pytest.mark.parametrize("family", of_each_kind(MERGED))
def test_patches_of_a_token_stand_row_by_row(family):
    """Of the 2 x 2 patches that become a token, the one that sees a quarter of its box is the one named for it."""
    vlm = wrapped(family)
    site = Site("vision.resid_pre", 0)
    dark = Image.new("RGB", SHAPES["wide"], (90, 90, 90))
    encoded = vlm.encode(Prompt(QUESTIONS[0], dark))
    before = read(vlm, encoded, site)[site]
    view = encoded.rows[0].images[0].layout.views[-1]
    token = (view.grid[0] // 2) * view.grid[1] + view.grid[1] // 2
    box = encoded.boxes(view=-1)[token]
    for quarter in range(4):
        down, across = (box.bottom - box.top) / 2, (box.right - box.left) / 2
        top, left = box.top + quarter // 2 * down, box.left + quarter % 2 * across
        pixels = np.array(dark)
        pixels[round(top) : round(top + down), round(left) : round(left + across)] = 255
        after = read(vlm, vlm.encode(Prompt(QUESTIONS[0], Image.fromarray(pixels))), site)[site]
        change = [(after - before)[row, position].norm().item() for row, position in view.patches[token].tolist()]
        assert int(np.argmax(change)) == quarter


@pytest.mark.parametrize("family", FEW)
def test_generation_with_edits_equals_whole_forwards(family):
    vlm = wrapped(family)
    encoded = vlm.encode(batch())
    edit = Knockout("last", "all", 2, keep_self=True) & Ablate(Site("llm.mlp_out", 1), "question")
    edit = edit & Steer(Site("projector.out"), "image", vector=torch.ones(vlm.width(Site("projector.out"))))
    made = generate(vlm, encoded, edit, max_new_tokens=3, eos_token_id=None)
    first = run(vlm, encoded, edit)
    assert made.ids.shape == (2, 3)
    assert made.ids[:, 0].tolist() == first.last.argmax(-1).tolist()
    assert len(made.receipts) == 3
    unedited = generate(vlm, encoded, max_new_tokens=3, eos_token_id=None)
    assert unedited.ids[:, 0].tolist() == plain(vlm, encoded)[:, -1].argmax(-1).tolist()


@pytest.mark.parametrize("family", ZOO)
def test_the_whole_image_of_another_run_gives_its_answer(family):
    """Swapping all image states at the projector's output (and what is added later) gives the donor's logits."""
    vlm = wrapped(family)
    encoded, donors = vlm.encode(batch(1)), vlm.encode(batch(7))
    swap = Replace(Site("vision.resid_pre", 0), "all", source=donors)
    swapped, donor = run(vlm, encoded, swap).last, run(vlm, donors).last
    assert (swapped - donor).abs().max() <= 1e-5 * max(1.0, donor.abs().max().item())
    assert (run(vlm, encoded).last - donor).abs().max() > 1e-3


def pairs_of(n: int = 2) -> Pairs:
    return Pairs(
        "pictures",
        tuple(
            Pair(str(number), picture(number, *SHAPES["wide"]), picture(number + 20, *SHAPES["wide"]), QUESTIONS[0],
                 "red", "blue")
            for number in range(n)
        ),
    )  # fmt: skip


@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_the_state_swap_runs_on_every_family_unchanged(family):
    vlm = wrapped(family)
    pairs = fitting(vlm, pairs_of())
    for stream in ("vision", "projector", "llm"):
        visited = swap_sites(vlm, stream, "resid_post")
        table, receipts = swap_states(vlm, pairs, visited, default_spans(vlm, stream), only_correct=False)
        assert len(table) == 2 * 2 * len(visited) * len(default_spans(vlm, stream))
        assert len(receipts) == len(table) // 2
        if stream == "llm":
            last = table[(table["layer"] == vlm.n_layers("llm") - 1) & (table["span"] == "last")]
            assert np.allclose(last["recovered"].dropna(), 1.0, atol=1e-3)
            image = table[(table["layer"] == vlm.n_layers("llm") - 1) & (table["span"] == "image")]
            assert np.allclose(image["recovered"].dropna(), 0.0, atol=1e-3)
        else:
            whole = "all" if stream == "vision" and vlm.n_class_tokens else "image"
            reached = table[table["span"] == whole]
            if stream == "vision":
                # What is read from an earlier block is not swapped with a later one.
                first = min(*vlm.family.vision_reads(vlm.config), *(tap + 1 for tap in vlm.taps), 99)
                reached = reached[reached["layer"] < first]
            elif vlm.taps:
                continue
            assert np.allclose(reached["recovered"].dropna(), 1.0, atol=1e-3)


def test_the_experiment_runs_on_a_folder_of_another_family(tmp_path):
    from experiments import layer_swap
    from vlm_mech.runs import contract

    model, processor = ZOO["qwen2_5_vl"]("sdpa", 0)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = []
    for pair in pairs_of(3):
        names = {"image": f"{pair.id}a.png", "counterfactual_image": f"{pair.id}b.png"}
        pair.image.save(tmp_path / names["image"])
        pair.counterfactual_image.save(tmp_path / names["counterfactual_image"])
        rows.append({**names, "question": pair.question, "answer": "red", "counterfactual_answer": "blue"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["--model", tmp_path / "model", "--data", tmp_path, "--all", "--out", tmp_path / "out"]
    contract.main(layer_swap.Config, layer_swap.run, name="layer_swap", argv=[str(each) for each in line])
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize("family", [name for name in ZOO if name.startswith(("qwen", "glm", "mistral3", "llava_next"))])
def test_images_cut_differently_cannot_be_exchanged(family):
    vlm = wrapped(family)
    wide, tall = (Prompt(QUESTIONS[0], picture(1, *SHAPES[name])) for name in ("wide", "tall"))
    with pytest.raises(UsageError, match="are cut into .* tokens, those of its source into|both must be equal"):
        run(vlm, wide, Replace(Site("llm.resid_post", 1), "image", source=[tall]))
    with pytest.raises(UsageError, match="are cut into grids|need the same"):
        fitting(vlm, Pairs("unlike", (Pair("one", wide.image, tall.image, QUESTIONS[0], "red", "blue"),)))
    run(vlm, wide, Replace(Site("llm.resid_post", 1), "last", source=[tall]))


@pytest.mark.parametrize("family", ZOO)
def test_another_number_of_images_than_placeholders_is_one_line(family):
    vlm = wrapped(family)
    two = Prompt(QUESTIONS[0], [picture(1), picture(2)])
    if family in ONE_IMAGE:
        with pytest.raises(UsageError, match="takes one image a prompt"):
            vlm.encode(two)
        return
    text = render(vlm, two)[0]
    with pytest.raises(UsageError, match=r"1 image\(s\) for 2 image placeholder\(s\)"):
        vlm.encode(Prompt(QUESTIONS[0], picture(1), text=text))
    if family != "paligemma":
        text_only = vlm.encode(Prompt(QUESTIONS[0]))
        assert run(vlm, text_only).last.shape[0] == 1 and text_only.rows[0].image == ()
        with pytest.raises(UsageError, match="needs an image"):
            read(vlm, text_only, Site("vision.resid_post", 1))


@pytest.mark.parametrize("family", ZOO)
def test_a_foreign_processor_is_refused(family):
    model = ZOO[family]("sdpa", 0)[0]
    model.config.image_token_id += 1
    with pytest.raises(UsageError, match="does not belong to the model|mismatch|does not fit"):
        VLM(model, ZOO[family]("sdpa", 0)[1])


@pytest.mark.parametrize("family", ZOO)
def test_a_model_in_a_few_lines(family):
    vlm = wrapped(family)
    text = repr(vlm)
    assert f"VLM {family}: {vlm.family.name}" in text and "patches of" in text and len(text.splitlines()) == 5
    assert vlm._repr_html_().count("<tr>") == 4


def test_the_table_of_families_is_what_the_checks_give():
    """Every family under both back ends: load checks, parity, sites, cuts and generation; the tests above ask more."""
    page = families_table.PAGE.read_text()
    assert families_table.table() in page, "python -m tests.zoo.families_table writes it anew"
    assert all(f"`{family.model_type}`" in page for family in FAMILIES)


def test_several_vision_layers_read_side_by_side():
    """Configurations may name a list of layers; each is written and read back at its place."""
    config = tiny_config()
    config.vision_feature_layer = [-3, -2]
    torch.manual_seed(0)
    vlm = VLM(LlavaForConditionalGeneration(config).eval(), tiny_processor())
    assert vlm.vision_depth == 3
    base = run(vlm, batch())
    for layer, reaches in ((1, True), (2, True), (3, False)):
        receipt = run(vlm, batch(), Ablate(Site("vision.resid_post", layer), "all"), baseline=base).receipts[0]
        assert receipt.reaches == reaches == (receipt.pass_readout_change > 0)
