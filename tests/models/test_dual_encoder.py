"""Contrastive models behind the names of the VLM wrapper, on tiny random models of the real classes."""

import dataclasses
import io

import numpy as np
import pytest
import sentencepiece
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tests.zoo.tiny import IMAGE_SIZE, PATCH_SIZE, WORDS, picture
from vlm_mech.architectures import contrastive_families
from vlm_mech.architectures.contrastive_families import CLIP, DUAL_FAMILIES, SIGLIP, SIGLIP2
from vlm_mech.architectures.families import CONTRASTIVE_TYPES
from vlm_mech.architectures.site import BLOCK_POINTS, Site
from vlm_mech.data.render import render
from vlm_mech.data.scenes import Scene, Thing
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.contrastive_batch import last_position
from vlm_mech.inputs.span import Each, Patches, Positions, Words
from vlm_mech.interventions.specification import Ablate, Intervention, Knockout, Replace, Steer
from vlm_mech.interventions.trace import Run, generate, read, run
from vlm_mech.models.dual_encoder import DualEncoder
from vlm_mech.models.vlm import VLM

SIZES = ((56, 56), (120, 64), (64, 120))
TEXTS = ("a red circle", "is the blue star left of the square")
OTHER_TEXTS = ("the one star", "the dog and cat on the red triangle")
"""As long as `TEXTS`, in words and in letters."""
FAMILIES = ("clip", "siglip", "siglip2")
EMBEDS = (Site("vision.embed"), Site("text.embed"))
N_POS = 40


def word_tokenizer(*, closing: bool) -> hf.PreTrainedTokenizerFast:
    """Words as tokens, padded on the right: with an end token and a mask as CLIP's, or with neither as SigLIP's."""
    vocabulary = {word: at for at, word in enumerate(["<pad>", "<s>", "<unk>", "</s>", *sorted(set(WORDS))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    if closing:
        template = {"single": "<s> $A </s>", "special_tokens": [("<s>", 1), ("</s>", 3)]}
        made.post_processor = processors.TemplateProcessing(**template)
    names = ["input_ids", "attention_mask"] if closing else ["input_ids"]
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="right", model_input_names=names, model_max_length=N_POS,
    )  # fmt: skip


def letter_tokenizer() -> hf.Siglip2Tokenizer:
    """The real class with letters as tokens: it pads on the left and gives a mask."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    letters = {token: at for at, token in enumerate([*specials, *"abcdefghijklmnopqrstuvwxyz"])}
    return hf.Siglip2Tokenizer(vocab=letters, merges=[], model_max_length=N_POS)


def piece_tokenizer(folder) -> hf.SiglipTokenizer:
    """The real class around SentencePiece, which gives no offsets and pads with the end token."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, *OTHER_TEXTS] * 20), model_writer=model, vocab_size=40,
        hard_vocab_limit=False, minloglevel=2, pad_id=3,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    return hf.SiglipTokenizer(str(folder / "spiece.model"))


def tiny_dual(family: str, attn: str = "sdpa", *, tokenizer=None, end: int = 3):
    """A random model and its real processor; weights so large that every intervention moves the similarities."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    vision = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
        "patch_size": PATCH_SIZE,
    }  # fmt: skip
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 80,
        "max_position_embeddings": N_POS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": end,
    }  # fmt: skip
    if family == "clip":
        vision["image_size"] = IMAGE_SIZE
        config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
        images = hf.CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
        processor = hf.CLIPProcessor(images, tokenizer or word_tokenizer(closing=True))
    elif family == "siglip":
        vision["image_size"] = IMAGE_SIZE
        config = hf.SiglipConfig(text_config={**text, "projection_size": 24}, vision_config=vision)
        images = hf.SiglipImageProcessorPil(size=size)
        processor = hf.SiglipProcessor(images, tokenizer or word_tokenizer(closing=False))
    else:
        vision |= {"patch_size": 16, "num_patches": 16}
        config = hf.Siglip2Config(text_config={**text, "projection_size": 24}, vision_config=vision)
        processor = hf.Siglip2Processor(hf.Siglip2ImageProcessorPil(), tokenizer or letter_tokenizer())
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(config, attn_implementation=attn)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.0 / parameter.shape[-1] ** 0.5 if "embed" not in name else 1.0)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval(), processor


@pytest.fixture(scope="module")
def wrapped():
    """Makes (and keeps) the checked wrapper of a tiny model."""
    made: dict[tuple[str, str], DualEncoder] = {}

    def make(family: str, attn: str = "sdpa") -> DualEncoder:
        if (family, attn) not in made:
            made[family, attn] = DualEncoder(*tiny_dual(family, attn), name=family)
        return made[family, attn]

    return make


def batch(dual: DualEncoder, seed: int = 1, texts=TEXTS):
    """Three pictures of unequal shape and two texts of unequal length."""
    limit = 18 if dual.family is SIGLIP2 else None
    return dual.encode([picture(seed + at, *size) for at, size in enumerate(SIZES)], texts, max_patches=limit)


def plain(dual: DualEncoder, encoded) -> torch.Tensor:
    with torch.no_grad():
        return dual.model(**encoded.inputs).logits_per_image


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_edit_equals_hugging_face_exactly(wrapped, family, attn):
    dual = wrapped(family, attn)
    encoded = batch(dual)
    logits = run(dual, encoded).logits
    assert logits.shape == (3, 2)
    assert (logits - plain(dual, encoded)).abs().max() == 0.0
    states = read(dual, encoded, [*EMBEDS, Site("vision.resid_post", 3), Site("text.resid_post", 2)])
    with torch.no_grad():
        out = dual.model(**encoded.inputs)
    for site, expected in zip(EMBEDS, (out.image_embeds, out.text_embeds), strict=True):
        assert states[site].shape[1] == 1 and states[site].shape[2] == dual.width(site)
        found = torch.nn.functional.normalize(states[site][:, 0], dim=-1)
        assert (found - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_images_and_texts_are_independent_of_their_batch(wrapped, family):
    dual = wrapped(family)
    together = run(dual, batch(dual)).logits
    for image, size in enumerate(SIZES):
        for number, text in enumerate(TEXTS):
            limit = 18 if family == "siglip2" else None
            alone = run(dual, dual.encode([picture(1 + image, *size)], [text], max_patches=limit)).logits
            assert (alone[0, 0] - together[image, number]).abs() <= 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_back_ends_agree_with_and_without_knockouts(wrapped, family):
    edits: list[Intervention | None] = [None]
    edits.append(Knockout("last", "all", range(3), stream="text", keep_self=True))
    edits.append(Knockout("all", "image", (1, 2), stream="vision", keep_self=True))
    for edit in edits:
        sdpa, eager = (run(wrapped(family, attn), batch(wrapped(family, attn)), edit).logits for attn in ATTENTIONS)
        assert (sdpa - eager).abs().max() <= 1e-5 * max(1.0, sdpa.abs().max().item())


ATTENTIONS = ("sdpa", "eager")


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_written_with_effect_or_a_reason(wrapped, family, attn):
    dual = wrapped(family, attn)
    encoded = batch(dual)
    baseline = run(dual, encoded)
    spans = {"vision": ["all", "image", Patches(((1, 1),))], "text": ["all", "last", Words("red"), Words("blue")]}
    if dual.n_class_tokens:
        spans["vision"].append("class")
    spans["text"][2:] = [Each((Words("red"), Words("blue")))]
    reached = {True: 0, False: 0}
    for stream in ("vision", "text"):
        for site in (Site(f"{stream}.{point}", at) for at in range(dual.n_layers(stream)) for point in BLOCK_POINTS):
            for span in spans[stream]:
                receipt = run(dual, encoded, Ablate(site, span), baseline=baseline).receipts[0]
                assert receipt.change > 0 and receipt.witness
                assert (receipt.pass_readout_change > 0) == receipt.reaches, receipt
                assert receipt.reaches or receipt.reason
                reached[receipt.reaches] += 1
    assert reached[True] > 60 and reached[False] >= 4
    for site in EMBEDS:
        vector = torch.randn(dual.width(site), generator=torch.Generator().manual_seed(0))
        for edit in (Steer(site, "all", vector=vector), Ablate(site, "all", to="mean")):
            receipt = run(dual, encoded, edit, baseline=baseline).receipts[0]
            assert receipt.change > 0 and receipt.pass_readout_change > 0 and receipt.reaches
            assert receipt.witness == ("image_embeds" if site.stream == "vision" else "text_embeds")


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_attention_is_exactly_zero_in_both_towers(wrapped, family, attn):
    dual = wrapped(family, attn)
    encoded = batch(dual)
    baseline = run(dual, encoded)
    pairs = {"text": [("last", "all"), (Each((Words("circle"), Words("square"))), "all")], "vision": [("all", "image")]}
    for stream, asked in pairs.items():
        for layer in range(dual.n_layers(stream)):
            for heads in (None, (1, 3)):
                for query, key in asked:
                    edit = Knockout(query, key, layer, heads=heads, stream=stream, keep_self=True)
                    receipt = run(dual, encoded, edit, baseline=baseline).receipts[0]
                    assert receipt.blocked_mass == 0.0 and receipt.natural_mass > 0 and receipt.n_edges > 0
                    assert (receipt.pass_readout_change > receipt.tolerance) == receipt.reaches


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_pooled_position_of_the_last_block_moves_the_embedding(wrapped, family):
    dual = wrapped(family)
    encoded = batch(dual)
    before = read(dual, encoded, EMBEDS)
    site, into = EMBEDS[1], Site("text.resid_post", dual.n_layers("text") - 1)
    vector = torch.randn(dual.width(into), generator=torch.Generator().manual_seed(0))
    for text in range(2):
        for position in encoded.positions("all", text):
            spans = [Positions((encoded.positions("last", other)[0],)) for other in range(2)]
            spans[text] = Positions((position,))
            after = read(dual, encoded, site, Steer(into, Each(tuple(spans)), vector=vector))[site]
            moved = (after - before[site])[text].abs().max() > 1e-4
            assert moved == (position == encoded.pooled[text])
    ids = encoded.inputs["input_ids"]
    if family == "clip":
        assert [ids[row, at] for row, at in enumerate(encoded.pooled)] == [3, 3]
        assert encoded.pooled[0] < ids.shape[1] - 1, "the shorter text must hold padding after its end"
    else:
        assert encoded.pooled == (N_POS - 1, N_POS - 1)
    into = Site("vision.resid_post", dual.n_layers("vision") - 1)
    vector = torch.randn(dual.width(into), generator=torch.Generator().manual_seed(0))
    for span, moves in (("class", True), ("image", False)) if family == "clip" else (("image", True),):
        after = read(dual, encoded, EMBEDS[0], Steer(into, span, vector=vector))[EMBEDS[0]]
        assert ((after - before[EMBEDS[0]]).abs().amax(dim=(1, 2)) > 1e-4).tolist() == [moves] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_agree_with_the_processors_ids(wrapped, family):
    dual = wrapped(family)
    encoded = batch(dual)
    row = encoded.text_rows[1]
    shown = [row.tokens[position] for position in encoded.positions(Words("blue star"), 1)]
    assert shown == (["blue", "star"] if family != "siglip2" else [*"blue▁star"])
    n_all = [len(encoded.positions("all", text)) for text in range(2)]
    n_words = [len(dual.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert n_all == ([N_POS, N_POS] if family == "siglip" else n_words)
    n_patches = [len(encoded.positions("image", image, place="vision")) for image in range(3)]
    if family == "siglip2":
        shapes = encoded.inputs["spatial_shapes"]
        assert n_patches == shapes.prod(1).tolist() == encoded.inputs["pixel_attention_mask"].sum(1).tolist()
        assert len({tuple(shape) for shape in shapes.tolist()}) == 3 and 16 in n_patches
        assert [list(encoded.grids(image)[0]) for image in range(3)] == shapes.tolist()
    else:
        assert n_patches == [16] * 3
    n_columns = encoded.grids(1)[0][1]
    assert encoded.positions(Patches(((1, 2),)), 1, place="vision") == (dual.n_class_tokens + n_columns + 2,)
    vision = read(dual, encoded, Site("vision.resid_pre", 0))[Site("vision.resid_pre", 0)]
    assert vision.shape[:2] == (3, 18 if family == "siglip2" else 16 + dual.n_class_tokens)
    assert encoded.cells(Each(("all", "last")), place="text").counts == (n_all[0], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_of_a_patch_are_what_it_sees(wrapped, family):
    """Patch -> pixel box -> patch: an image changed inside a patch's box alone moves that patch most."""
    dual = wrapped(family)
    site, limit = Site("vision.resid_pre", 0), 18 if family == "siglip2" else None
    for size in SIZES:
        dark = Image.new("RGB", size, (90, 90, 90))
        encoded = dual.encode([dark], [TEXTS[0]], max_patches=limit)
        boxes, grid = encoded.boxes(), encoded.grids()[0]
        assert len(boxes) == grid[0] * grid[1]
        pictures = []
        for box in boxes:
            pixels = np.array(dark)
            pixels[round(box.top) : round(box.bottom), round(box.left) : round(box.right)] = 255
            pictures.append(Image.fromarray(pixels))
        changed = dual.encode(pictures, [TEXTS[0]], max_patches=limit)
        moved = (read(dual, changed, site)[site] - read(dual, encoded, site)[site]).norm(dim=-1)
        cells = [encoded.positions(Patches((divmod(at, grid[1]),)), place="vision")[0] for at in range(len(boxes))]
        assert moved.argmax(-1).tolist() == cells


@pytest.mark.parametrize("family", FAMILIES)
def test_own_states_change_nothing_and_a_donors_give_its_similarities(wrapped, family):
    dual = wrapped(family)
    encoded, donors = batch(dual), batch(dual, 7, OTHER_TEXTS)
    base, wanted = run(dual, encoded).logits, run(dual, donors).logits
    assert (base - wanted).abs().max() > 1e-2
    firsts = Site("vision.resid_pre", 0), Site("text.resid_pre", 0)
    for sites in (firsts, EMBEDS, (Site("vision.resid_post", 3), Site("text.resid_post", 2))):
        own, swapped = (
            run(dual, encoded, Replace(sites[0], "all", source=source) & Replace(sites[1], "all", source=source)).logits
            for source in (encoded, donors)
        )
        assert torch.equal(own, base)
        assert (swapped - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())
    only = run(dual, encoded, Replace(EMBEDS[0], "all", source=donors)).logits
    crossed = run(dual, batch(dual, 7, TEXTS)).logits
    assert (only - crossed).abs().max() <= 1e-5 * max(1.0, crossed.abs().max().item())


def test_an_old_clip_pools_the_highest_id_and_is_deaf_to_what_follows():
    dual = DualEncoder(*tiny_dual("clip", end=2))
    encoded = dual.encode([picture(1)], ["is the yellow star left of a dog"])
    assert encoded.text_rows[0].tokens[encoded.pooled[0]] == "yellow"
    for words, reaches in ((Words("star left"), False), (Words("is the"), True)):
        receipt = run(dual, encoded, Ablate(Site("text.resid_pre", 1), words)).receipts[0]
        assert receipt.reaches == reaches == (receipt.pass_readout_change > 0)
        assert ("causal" in receipt.reason) == (not reaches)


def test_words_are_found_without_offsets(tmp_path):
    dual = DualEncoder(*tiny_dual("siglip", tokenizer=piece_tokenizer(tmp_path)))
    encoded = dual.encode([picture(1)], ["Is the BLUE star, left of the square."])
    tokens = [encoded.text_rows[0].tokens[position] for position in encoded.positions(Words("blue star"))]
    assert "".join(tokens).replace("▁", " ").strip() == "blue star"
    receipt = run(dual, encoded, Ablate(Site("text.resid_post", 1), Words("blue star"))).receipts[0]
    assert receipt.pass_readout_change > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_opens_by_folder(family, tmp_path):
    model, processor = tiny_dual(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    dual = DualEncoder.load(tmp_path, check=False)
    assert (run(dual, batch(dual)).logits - plain(dual, batch(dual))).abs().max() == 0.0
    described = repr(dual)
    assert described.startswith(f"DualEncoder {tmp_path}: ") and "text    3       32 to" in described
    assert "<table>" in dual._repr_html_() and dual.identity()["weights"]


def test_the_embedded_model_tells_captions_apart_through_its_embeddings():
    clip = DualEncoder.load("clip")
    scene = Scene((Thing("star", ("red",), "large", 40, 50),), 228, 1)
    other = Scene((Thing("circle", ("blue",), "large", 60, 40),), 228, 2)
    told = ["a red star", "a blue star", "a red circle", "a blue circle"]
    encoded = clip.encode([render(scene), render(other)], told)
    logits = run(clip, encoded).logits
    assert logits.argmax(-1).tolist() == [0, 3]
    swap = Replace(Site("vision.resid_post", 1), "all", source=clip.encode([render(other), render(scene)], told[:1]))
    assert run(clip, encoded, swap).logits.argmax(-1).tolist() == [3, 0]


def test_a_record_that_does_not_hold_is_refused(monkeypatch):
    assert tuple(family.model_type for family in DUAL_FAMILIES) == CONTRASTIVE_TYPES
    towers = {"text": CLIP.vision}, {"vision_embed": "text_projection"}
    for change in (*towers, {"class_tokens": 0}, {"pooled": last_position}, {"text_embed": "text_model.head"}):
        wrong = dataclasses.replace(CLIP, **change)
        monkeypatch.setattr(contrastive_families, "DUAL_FAMILIES", (wrong, SIGLIP, SIGLIP2))
        with pytest.raises(WorkError):
            DualEncoder(*tiny_dual("clip"))


def test_wrong_use_is_told_in_one_line(wrapped, vlm):
    dual = wrapped("clip")
    encoded = batch(dual)
    with pytest.raises(UsageError, match="use DualEncoder"):
        VLM.load("clip")
    with pytest.raises(UsageError, match="use VLM"):
        DualEncoder.load("organism")
    with pytest.raises(UsageError, match="contrastive models of these types are: clip, siglip, siglip2"):
        DualEncoder(
            hf.LlamaForCausalLM(
                hf.LlamaConfig(num_hidden_layers=1, hidden_size=8, vocab_size=8, num_attention_heads=2)
            ),
            None,
        )
    absent = Ablate(Site("llm.mlp_out", 1), "all"), Ablate(Site("projector.in"), "all")
    for edit in (*absent, Knockout("last", "all", 1)):
        with pytest.raises(UsageError, match="clip has no site"):
            run(dual, encoded, edit)
    prompt = vlm.prompt("what colour is the circle?", picture(1))
    for edit in (Ablate(Site("text.mlp_out", 1), "all"), Knockout("last", "all", 1, stream="text")):
        with pytest.raises(UsageError, match="has no site 'text"):
            run(vlm, prompt, edit)
    with pytest.raises(UsageError, match="has no site 'vision.embed'"):
        read(vlm, prompt, Site("vision.embed"))
    with pytest.raises(UsageError, match="takes a batch made by encode"):
        run(dual, prompt)
    with pytest.raises(UsageError, match="takes prompts"):
        run(vlm, encoded)
    with pytest.raises(UsageError, match="generate takes models with a decoder"):
        generate(dual, encoded)
    with pytest.raises(UsageError, match="no last token"):
        _ = Run(torch.zeros(2, 3), encoded).last
    with pytest.raises(UsageError, match="no direction"):
        run(dual, encoded, Ablate(Site("text.embed"), "all"))


def test_wrong_spans_and_inputs_are_told_in_one_line(wrapped):
    dual = wrapped("clip")
    encoded = batch(dual)
    for span, place, told in (
        ("last", "vision.embed", "only span is 'all'"), ("question", "text", "is not known in a text"),
        (Positions((39,)), "text", "does not fit text 0"), (Words("dog"), "text", "occurs 0 times"),
        (Patches(((4, 0),)), "vision", "outside the grid"), (Each(("all",)), "text", "Each gives 1 spans"),
        ("all", "llm", "place 'llm' is not known"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=told):
            encoded.cells(span, place=place)
    for images, texts, told in (
        ([], ["a dog"], "at least one of each"), ([picture(1)], ["  "], "a text with words"),
        ([picture(1)], ["dog " * 50], "has 52 tokens, the text tower takes at most 40"),
        ([picture(1)], ["a dog", "a </s> dog"], "text 1 'a </s> dog' holds '</s>', which is not text to clip"),
        ("x.png", ["a"], "takes a list"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=told):
            dual.encode(images, texts)
    # The tower would pool the end that the text brings, and read nothing after it.
    assert dual.encode([picture(1)], ["a </s> dog"], special_tokens=True).pooled == (2,)
    with pytest.raises(UsageError, match="max_patches is for NaFlex"):
        dual.encode([picture(1)], ["a dog"], max_patches=9)
    model, processor = tiny_dual("clip", tokenizer=word_tokenizer(closing=False))
    with pytest.raises(UsageError, match="no end-of-text token"):
        DualEncoder(model, processor)
