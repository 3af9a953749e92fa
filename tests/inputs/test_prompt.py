"""Prompts and spans, on pictures of every shape, and the way back from a patch to its pixels."""

import base64
import io
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.zoo import ZOO
from tests.zoo.tiny import picture
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import Box, load_image
from vlm_mech.inputs.prompt import Prompt, render
from vlm_mech.inputs.span import Each, Patches, Words
from vlm_mech.models.vlm import VLM


def tokens(vlm, encoded, span, example):
    row = encoded.rows[example]
    return [row.tokens[position] for position in encoded.positions(span, example)]


def test_spans_hold_the_right_tokens(vlm, prompts):
    encoded = vlm.encode(prompts)
    assert tokens(vlm, encoded, "question", 0) == ["what", "colour", "is", "the", "circle", "?"]
    assert tokens(vlm, encoded, "question", 2) == ["what", "is", "<unk>", "?"]
    assert tokens(vlm, encoded, "system", 0) == ["<s>", "user", ":"]
    assert tokens(vlm, encoded, "system", 2)[:3] == ["<s>", "system", ":"]
    assert tokens(vlm, encoded, "image", 1) == ["<image>"] * 16
    assert tokens(vlm, encoded, "answer_prompt", 1) == ["assistant", ":"]
    assert tokens(vlm, encoded, "last", 1) == [":"]
    assert tokens(vlm, encoded, Words("blue circle"), 1) == ["blue", "circle"]
    assert tokens(vlm, encoded, (Words("star"), "last"), 1) == ["star", ":"]


def test_named_spans_partition_the_prompt_whatever_the_padding(vlm, prompts):
    encoded = vlm.encode(prompts)
    for example, row in enumerate(encoded.rows):
        parts = [encoded.positions(span, example) for span in ("system", "image", "question", "answer_prompt")]
        joined = sorted(position for part in parts for position in part)
        assert joined == list(encoded.positions("all", example)) == list(row.present)
        assert (encoded.inputs["attention_mask"][example] == 0).sum() == encoded.n_pos - len(row.present)


def test_encoding_is_what_the_processor_makes(vlm, prompts):
    encoded = vlm.encode(prompts)
    texts = [render(vlm, prompt)[0] for prompt in prompts]
    plain = vlm.processor(images=[prompt.image for prompt in prompts], text=texts, padding=True, return_tensors="pt")
    assert (plain["input_ids"] == encoded.inputs["input_ids"]).all()
    assert (plain["pixel_values"] == encoded.inputs["pixel_values"]).all()


@pytest.mark.parametrize("span", [Words("the"), Words("banana"), Words("")])
def test_ambiguous_and_missing_words_raise_and_print_the_tokens(vlm, span):
    encoded = vlm.encode(Prompt("is the circle left of the star?", picture(1)))
    with pytest.raises(UsageError, match=r"once is needed.*'<image>' x 16 'is' 'the' 'circle'"):
        encoded.positions(span)


def test_unknown_and_empty_spans_raise(vlm, prompts):
    encoded = vlm.encode(prompts)
    with pytest.raises(UsageError, match="named spans: all, system, image, separator, question, answer_prompt, last"):
        encoded.cells("picture")
    with pytest.raises(UsageError, match="named spans: image"):
        encoded.cells("last", place="projector.out")
    with pytest.raises(UsageError, match=r"patch \(4, 0\) is outside the grid of 4 rows x 4 columns"):
        encoded.cells(Patches(((4, 0),)))
    with pytest.raises(UsageError, match="Each gives 1 spans for a batch of 3"):
        encoded.cells(Each(("last",)))
    text_only = vlm.encode(Prompt("what colour is the circle?"))
    with pytest.raises(UsageError, match=r"span 'image' is empty in example 0; its tokens: '<s>' 'user'"):
        text_only.cells("image")


def test_patches_in_decoder_and_tower(vlm, prompts):
    encoded = vlm.encode(prompts)
    first = encoded.positions("image", 1)[0]
    assert encoded.positions(Patches(((1, 2),)), 1) == (first + 6,)
    assert encoded.positions(Patches(((1, 2),)), 1, place="vision") == (7,)
    assert encoded.positions("class", 1, place="vision") == (0,)
    assert encoded.positions(Patches(((1, 2),)), 1, place="projector.out") == (6,)


def test_siglip_has_no_class_token(tiny_vlm, prompts):
    encoded = tiny_vlm("llama", "siglip").encode(prompts)
    assert encoded.positions(Patches(((1, 2),)), 1, place="vision") == (6,)
    with pytest.raises(UsageError, match="is empty"):
        encoded.positions("class", 1, place="vision")


@pytest.mark.parametrize("size", [(56, 56), (112, 56), (56, 140), (300, 200), (31, 47)])
def test_pixel_box_of_a_patch_is_what_the_patch_sees(vlm, size):
    """A picture that is white only inside one patch's box lights up that patch of the processed image and no other."""
    encoded = vlm.encode(Prompt("what is this?", Image.new("RGB", size)))
    for number in (0, 5, 11, 15):
        box = encoded.boxes()[number]
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        pixels[round(box.top) : round(box.bottom), round(box.left) : round(box.right)] = 255
        seen = vlm.encode(Prompt("what is this?", Image.fromarray(pixels))).inputs["pixel_values"][0].mean(0)
        patches = seen.reshape(4, 14, 4, 14).mean((1, 3)).flatten()
        assert patches.argmax() == number
        others = [value for index, value in enumerate(patches.tolist()) if index != number]
        assert patches[number] - max(others) > 0.6 * (patches[number] - min(others)) > 0


@pytest.mark.parametrize("size", [(56, 56), (112, 56), (56, 140), (300, 200), (31, 47), (1200, 777)])
def test_measured_boxes_are_those_of_the_known_rule(vlm, size):
    """This processor resizes the shorter edge and crops the centre, so its boxes are known without measuring."""
    scale = min(size) / 56
    left, top = ((edge - 56 * scale) / 2 for edge in size)
    patch = 14 * scale
    boxes = vlm.encode(Prompt("what is this?", Image.new("RGB", size))).boxes()
    for number, box in enumerate(boxes):
        row, column = divmod(number, 4)
        edges = (left + column * patch, top + row * patch, left + (column + 1) * patch, top + (row + 1) * patch)
        found = (box.left, box.top, box.right, box.bottom)
        assert np.allclose(found, edges, atol=0.03 * patch)


def test_boxes_overlap():
    box = Box(0.0, 0.0, 10.0, 10.0)
    assert box.overlaps(Box(9.0, 9.0, 20.0, 20.0)) and not box.overlaps(Box(10.0, 0.0, 20.0, 10.0))


def test_raw_text(vlm):
    text = "USER: <image> what colour is the circle? ASSISTANT: the"
    encoded = vlm.encode(Prompt("what colour is the circle?", picture(1), text=text))
    assert tokens(vlm, encoded, "answer_prompt", 0) == ["assistant", ":", "the"]
    with pytest.raises(UsageError, match="occurs 2 times in the raw text"):
        Prompt("circle", picture(1), text="<image> circle circle")
    with pytest.raises(UsageError, match=r"1 image\(s\) for 0 image placeholder"):
        vlm.encode(Prompt("circle", picture(1), text="USER: circle ASSISTANT:"))


def test_images_from_paths_and_what_is_no_image(vlm, tmp_path):
    picture(1).save(tmp_path / "one.png")
    from_path = vlm.encode(Prompt("what is this?", tmp_path / "one.png"))
    from_memory = vlm.encode(Prompt("what is this?", picture(1)))
    assert (from_path.inputs["pixel_values"] == from_memory.inputs["pixel_values"]).all()
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UsageError, match="cannot be read"):
        load_image(tmp_path / "text.png")
    whole = (tmp_path / "one.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="cannot be read"):
        load_image(tmp_path / "half.png")
    with pytest.raises(UsageError, match="does not exist"):
        load_image(tmp_path / "none.png")
    with pytest.raises(UsageError, match="not int"):
        load_image(3)


def test_images_of_every_kind_are_upright_rgb_or_refused(tmp_path):
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))
    grey = colours.convert("L")
    alpha = colours.convert("RGBA")
    alpha.putalpha(grey)
    for name, image, expected in (
        ("grey.png", grey, Image.merge("RGB", (grey, grey, grey))), ("alpha.png", alpha, colours),
        ("palette.png", grey.convert("P"), Image.merge("RGB", (grey, grey, grey))),
        ("both.png", Image.merge("LA", (grey, grey)), Image.merge("RGB", (grey, grey, grey))),
    ):  # fmt: skip
        image.save(tmp_path / name)
        for given in (tmp_path / name, str(tmp_path / name), image):
            found = load_image(given)
            assert found.mode == "RGB" and found.tobytes() == expected.tobytes(), name
    # Tag 274 with 6: the camera was turned, and the picture is to be turned clockwise by 90 degrees.
    exif = Image.Exif()
    exif[274] = 6
    colours.save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png").size == (8, 12)
    assert load_image(tmp_path / "turned.png").tobytes() == colours.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert np.asarray(load_image(tmp_path / "turned.png"))[0, -1].tolist() == np.asarray(colours)[0, 0].tolist()
    deep = Image.fromarray(np.arange(96, dtype=np.uint16).reshape(8, 12) * 600)
    deep.save(tmp_path / "deep.png")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    for name, values in (("deep.png", "I;16 values from 0 to 57000"), ("float.tiff", "F values from 1 to 1")):
        with pytest.raises(UsageError, match=f"{name}' has {values}; 8 bits") as caught:
            load_image(tmp_path / name)
        assert "cannot be read" not in str(caught.value)


def test_pictures_in_memory_are_pictures_in_every_form(vlm):
    buffer = io.BytesIO()
    picture(1).save(buffer, "PNG")
    content, pixels = buffer.getvalue(), np.asarray(picture(1))
    text = base64.b64encode(content).decode()
    expected = vlm.encode(Prompt("what is this?", picture(1))).inputs["pixel_values"]
    for given in (
        content, text, f"data:image/png;base64,{text}", "\n".join(text[at : at + 76] for at in range(0, len(text), 76)),
        pixels, {"bytes": content, "path": None}, {"bytes": None, "path": "a.png", "array": 1} | {"bytes": text},
    ):  # fmt: skip
        assert load_image(given).tobytes() == picture(1).tobytes()
        assert (vlm.encode(Prompt("what is this?", given)).inputs["pixel_values"] == expected).all()
        assert (vlm.encode(Prompt("what is this?", [given])).inputs["pixel_values"] == expected).all()
    assert load_image(pixels[..., 0]).tobytes() == picture(1).getchannel(0).convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"no picture", "the image cannot be read: it is in no format that Pillow knows"),
        ("data:image/png;base64,AAAA", "cannot be read"),
        ("A" * 23_247, r"image 'AAA.* \[... of 23249 characters ...\] A+' does not exist"),
        (np.zeros((4, 4, 3)), r"array of float64 of shape \(4, 4, 3\); uint8 of"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\); uint8 of \(height, width\), \(height, width, 3\)"),
        ({"pixels": 1}, "a mapping of pixels; bytes or path is needed"),
        ({"bytes": None, "path": "none.png"}, "'none.png' does not exist"),
    ],
)
def test_what_is_no_picture_is_one_short_line(given, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_image(given)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_a_file_that_claims_to_be_huge_is_refused_before_it_is_unpacked(tmp_path):
    picture(1).save(tmp_path / "bomb.png")
    whole = bytearray((tmp_path / "bomb.png").read_bytes())
    # Width and height are the first two numbers of the header chunk, which ends with their checksum.
    whole[16:24] = (50_000).to_bytes(4, "big") * 2
    whole[29:33] = zlib.crc32(bytes(whole[12:29])).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(whole)
    with pytest.raises(UsageError, match="cannot be read: Image size"):
        load_image(tmp_path / "bomb.png")


def test_images_from_an_address(vlm, tmp_path):
    import functools
    import http.server
    import threading

    picture(1).save(tmp_path / "one.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert load_image(f"{address}/one.png").tobytes() == picture(1).tobytes()
        with pytest.raises(UsageError, match="cannot be fetched"):
            load_image(f"{address}/none.png")
        server.shutdown()


def test_wrong_prompts_raise(vlm, prompts):
    with pytest.raises(UsageError, match="question is empty"):
        Prompt("  ", picture(1))
    with pytest.raises(UsageError, match="no prompts"):
        vlm.encode([])
    with pytest.raises(UsageError, match="cannot share a batch"):
        vlm.encode([prompts[0], Prompt("what is this?")])


def test_a_template_that_alters_the_question_raises(vlm):
    template, vlm.processor.chat_template = (
        vlm.processor.chat_template,
        vlm.processor.chat_template.replace("part['text']", "part['text'] | upper"),
    )
    try:
        with pytest.raises(UsageError, match="drops, repeats or alters the question"):
            vlm.encode(Prompt("what is this?", picture(1)))
        vlm.processor.chat_template = None
        with pytest.raises(UsageError, match="has no chat template"):
            vlm.encode(Prompt("what is this?", picture(1)))
    finally:
        vlm.processor.chat_template = template


def test_prompts_of_one_question_are_still_told_apart():
    """What differs but in the picture is made once a batch; pictures of other sizes and system messages differ more."""
    vlm = VLM(*ZOO["qwen2_vl"]("sdpa", 0), name="qwen2_vl", check=False)
    question = "what is this?"
    some = [Prompt(question, picture(1)), Prompt(question, picture(2, 112, 56)), Prompt(question, picture(3))]
    some.append(Prompt(question, picture(4), system="what colour is the circle?"))
    together = vlm.encode(some)
    for number, prompt in enumerate(some):
        alone, row = vlm.encode([prompt]).rows[0], together.rows[number]
        assert row.text == alone.text and row.question == alone.question
        assert [row.tokens[at] for at in row.present] == list(alone.tokens)
        assert row.images[0].layout.views[0].grid == alone.images[0].layout.views[0].grid
        shift = row.present[0]
        assert [at - shift for at in row.images[0].positions] == list(alone.images[0].positions)
    assert len({row.text for row in together.rows}) == 3 and together.rows[0].present == together.rows[2].present
