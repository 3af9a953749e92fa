"""Extraction over data sets: equal to `trace.read`, resumable to the byte, bounded in memory."""

import base64
import gc
import io
import json
import threading
import time
import weakref

import pytest
import torch
from PIL import Image

from tests.zoo import FAMILIES, ZOO
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import BLOCK_POINTS, Site, sites
from vlm_mech.data.pairs import load_pairs
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.extraction.extract import extract
from vlm_mech.extraction.saved_states import Extracted, only_here
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Each, Positions, Words
from vlm_mech.interventions.trace import read
from vlm_mech.models.vlm import VLM

CHOSEN = ("llava_clip", "qwen2_5_vl", "internvl", "instructblip", "gemma3")
QUESTIONS = ("what colour is the circle?", "is the red star left of the blue circle?", "what shape is it?")
RESIDUALS = sites("llm.resid_post", (1, 3))


@pytest.fixture(scope="module")
def wrapped():
    """Makes (and keeps) the wrapper of a family's tiny model, which has been run before."""
    made = {}

    def make(family: str, attn: str = "sdpa") -> VLM:
        if (family, attn) not in made:
            made[family, attn] = VLM(*ZOO[family](attn, 0), name=family, check=False)
            plain(made[family, attn], some(2))
        return made[family, attn]

    return make


def plain(vlm: VLM, prompts: list[Prompt]) -> None:
    with torch.no_grad():
        vlm.model(**vlm.encode(prompts).inputs, output_hidden_states=True)


def some(n: int, seed: int = 0) -> list[Prompt]:
    """Prompts of unequal length on pictures of unequal shape."""
    shapes = ((120, 64), (56, 56), (64, 120))
    return [Prompt(QUESTIONS[number % 3], picture(seed + number, *shapes[number % 3])) for number in range(n)]


def every_site(vlm: VLM, stream: str) -> tuple[Site, ...]:
    if stream == "projector":
        return Site("projector.in"), Site("projector.out")
    n_layers = vlm.vision_depth if stream == "vision" else vlm.n_layers("llm")
    return tuple(Site(f"{stream}.{point}", layer) for layer in range(1, n_layers) for point in BLOCK_POINTS)


def by_hand(vlm: VLM, prompts: list[Prompt], site: Site, span, example: int) -> torch.Tensor:
    """The states of a span in one example as `read` gives them."""
    encoded = vlm.encode(prompts)
    states = read(vlm, encoded, site)[site]
    cells = encoded.cells(span, place=site.place)
    start = sum(cells.counts[:example])
    chosen = slice(start, start + cells.counts[example])
    return states[cells.rows[chosen], cells.positions[chosen]]


SPANS = {"llm": ("image", "last", "question"), "vision": ("all", "image"), "projector": ("image",)}


@pytest.mark.parametrize("stream", SPANS)
@pytest.mark.parametrize("family", CHOSEN)
def test_every_site_equals_read(wrapped, tmp_path, family, stream):
    vlm, prompts, spans = wrapped(family), some(5), SPANS[stream]
    wanted = every_site(vlm, stream)
    options = {"spans": spans, "batch_size": 3, "dtype": "float32"}
    pooled = extract(vlm, prompts, wanted, folder=tmp_path / "mean", **options)
    whole = extract(vlm, prompts, wanted, folder=tmp_path / "whole", pool=None, **options)
    assert pooled.examples == whole.examples == (0, 1, 2, 3, 4)
    for batch, first in ((prompts[:3], 0), (prompts[3:], 3)):
        encoded = vlm.encode(batch)
        states = read(vlm, encoded, wanted)
        for site in wanted:
            for number, span in enumerate(spans):
                cells = encoded.cells(span, place=site.place)
                parts = states[site][cells.rows, cells.positions].split(cells.counts)
                for example, expected in enumerate(parts):
                    assert torch.equal(whole.whole(site, span, example=first + example), expected)
                    mean = pooled[site][first + example, number]
                    assert (mean - expected.mean(0)).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_streams_of_every_family(wrapped, tmp_path, family):
    vlm, prompts = wrapped(family), some(3)
    wanted = (Site("vision.resid_post", vlm.vision_depth - 1), Site("llm.resid_pre", 0), Site("llm.resid_post", 3))
    states = extract(vlm, prompts, wanted, spans="image", pool=None, folder=tmp_path, batch_size=3, dtype="float32")
    for site in wanted:
        for example in range(3):
            found = states.whole(site, "image", example)
            assert torch.equal(found, by_hand(vlm, prompts, site, "image", example))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_data_types_of_the_files(wrapped, tmp_path, dtype):
    vlm, prompts = wrapped("llava_clip"), some(4)
    site = RESIDUALS[1]
    options = {"spans": ("last",), "batch_size": 4}
    exact = extract(vlm, prompts, site, folder=tmp_path / "exact", dtype="float32", **options)[site]
    stored = extract(vlm, prompts, site, folder=tmp_path / "stored", dtype=dtype, **options)[site]
    assert stored.dtype == getattr(torch, dtype) and torch.equal(stored, exact.to(stored.dtype))


def test_opened_again_without_the_model(wrapped, tmp_path):
    made = extract(wrapped("llava_clip"), some(5), RESIDUALS, spans=("image", "last"), folder=tmp_path, batch_size=2)
    states = Extracted.open(tmp_path)
    states.verify()
    assert states.sites == RESIDUALS and states.spans == ("image", "last") and len(states) == 5
    assert torch.equal(states[RESIDUALS[0]], made[RESIDUALS[0]])
    assert torch.equal(states.pooled(RESIDUALS[0], "last"), states[RESIDUALS[0]][:, 1])
    with pytest.raises(UsageError, match="was not extracted"):
        states[Site("llm.resid_post", 2)]
    with pytest.raises(UsageError, match="only means"):
        states.whole(RESIDUALS[0], "last", 0)


class KilledError(Exception):
    pass


def killed_after(vlm: VLM, n_passes: int):
    """A hook that stops the pass after that many."""
    passes = []

    def kill(module, given) -> None:
        passes.append(1)
        if len(passes) > n_passes:
            raise KilledError

    return vlm.model.register_forward_pre_hook(kill), passes


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("pool", ["mean", None])
def test_a_killed_run_ends_in_the_same_bytes(wrapped, tmp_path, pool):
    vlm, prompts = wrapped("llava_clip"), some(11)
    options = {"spans": ("image", "last"), "pool": pool, "batch_size": 2, "dtype": "float16", "shard_mib": 9e-4}
    extract(vlm, prompts, RESIDUALS, folder=tmp_path / "whole", **options)
    for n_passes in (1, 3, 5):
        folder = tmp_path / f"killed_{n_passes}"
        hook, passes = killed_after(vlm, n_passes)
        with pytest.raises(KilledError):
            extract(vlm, prompts, RESIDUALS, folder=folder, **options)
        hook.remove()
        done = 0
        if (folder / "extract.json").exists():
            done = json.loads((folder / "extract.json").read_text())["shards"][-1]["stop"]
            with pytest.raises(UsageError, match="of 11 prompts"):
                Extracted.open(folder)
        hook, passes = killed_after(vlm, 100)
        extract(vlm, prompts, RESIDUALS, folder=folder, **options)
        hook.remove()
        assert n_passes < 2 or done > 0
        assert len(passes) == len(range(done, 11, 2)), "finished shards are not computed again"
        assert contents(folder) == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "whole")) > 3


def test_a_finished_run_is_not_run_again(wrapped, tmp_path):
    vlm, prompts = wrapped("llava_clip"), some(4)
    extract(vlm, prompts, RESIDUALS, spans="last", folder=tmp_path)
    hook, passes = killed_after(vlm, 0)
    extract(vlm, prompts, RESIDUALS, spans="last", folder=tmp_path)
    hook.remove()
    assert not passes


@pytest.mark.parametrize("pool", ["mean", None])
@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_together_are_the_states_of_one_process(wrapped, tmp_path, pool, order):
    vlm, prompts = wrapped("llava_clip"), [*some(7), Prompt(QUESTIONS[0]), *some(4, seed=50)]
    how = {"spans": ["last", "question"], "pool": pool, "batch_size": 2, "shard_mib": 0.001}
    whole = extract(vlm, prompts, RESIDUALS, folder=tmp_path / "whole", **how)
    for number in order:
        made = extract(vlm, prompts, RESIDUALS, folder=tmp_path / "parts", part=f"{number}/3", **how)
        assert len(made) < len(prompts)
    joined = Extracted.open(tmp_path / "parts")
    joined.verify()
    assert joined.examples == whole.examples == tuple(range(12))
    for site in RESIDUALS:
        if pool == "mean":
            assert torch.equal(joined[site], whole[site])
        else:
            every = ((span, number) for span in ("last", "question") for number in range(12))
            assert all(torch.equal(joined.whole(site, *each), whole.whole(site, *each)) for each in every)


def test_parts_that_are_missing_or_do_not_belong_together(untyped, wrapped, tmp_path):
    vlm, how = wrapped("llava_clip"), {"spans": "last", "batch_size": 2}
    wrong = {
        "0/2": "K/N is needed",
        "3/2": "K/N",
        "2": "K/N",
        3: "part is 3; K/N",
        "1/9": "'1/9', of 2 batches in all; at most 2",
    }
    for part, message in wrong.items():
        with pytest.raises(UsageError, match=message):
            extract(vlm, some(4), RESIDUALS, folder=tmp_path / "wrong", part=part, **how)
    assert not (tmp_path / "wrong").exists()
    extract(vlm, some(4), RESIDUALS, folder=tmp_path, part="2/2", **how)
    with pytest.raises(UsageError, match="lacks part 1/2"):
        Extracted.open(tmp_path)
    extract(vlm, some(4, seed=9), RESIDUALS, folder=tmp_path, part="1/2", **how)
    with pytest.raises(UsageError, match="parts 1/2 and 2/2 in .* had other arguments: prompts"):
        Extracted.open(tmp_path)


def test_a_process_waits_for_another_at_work_in_the_folder(wrapped, tmp_path):
    began = threading.Event()
    seen = []

    def other():
        with only_here(tmp_path / "states"):
            began.set()
            time.sleep(0.5)
            seen.append("written")

    thread = threading.Thread(target=other)
    thread.start()
    began.wait()
    extract(wrapped("llava_clip"), some(2), RESIDUALS, spans="last", folder=tmp_path / "states")
    assert seen == ["written"]
    thread.join()


def palette(colour):
    """A picture whose indices are the same for every colour."""
    made = Image.new("P", (56, 56))
    made.putdata([int(20 < number % 56 < 40) for number in range(56 * 56)])
    made.putpalette([0, 0, 0, *colour])
    return made


def turned(image):
    image = image.copy()
    image.getexif()[0x0112] = 6
    return image


@pytest.mark.parametrize(
    ("before", "after"),
    [(palette((255, 0, 0)), palette((0, 0, 255))), (picture(0, 56, 56), turned(picture(0, 56, 56)))],
    ids=["palette", "orientation"],
)
def test_pictures_are_told_apart_by_the_pixels_that_a_model_gets(wrapped, tmp_path, before, after):
    """The states of the first picture were given out for the second."""
    options = {"sites": RESIDUALS, "spans": "image", "folder": tmp_path / "states"}
    extract(wrapped("llava_clip"), [Prompt(QUESTIONS[0], before)], **options)
    with pytest.raises(UsageError, match="had other arguments: prompts"):
        extract(wrapped("llava_clip"), [Prompt(QUESTIONS[0], after)], **options)


def test_a_processor_that_was_changed_is_noticed(wrapped, tmp_path, monkeypatch):
    """Another mean of pixels or another chat template gave the states of the old one."""
    vlm, options = wrapped("llava_clip"), {"sites": RESIDUALS, "spans": "image", "folder": tmp_path / "states"}
    extract(vlm, some(2), **options)
    template = vlm.processor.chat_template
    for part, name, value in (
        (vlm.processor.image_processor, "image_mean", [0.0, 0.0, 0.0]),
        (vlm.processor, "chat_template", "describe: " + template),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(part, name, value)
            with pytest.raises(UsageError, match="had other arguments: processor"):
                extract(vlm, some(2), **options)
    assert len(extract(vlm, some(2), **options)) == 2


@pytest.mark.usefixtures("untyped")
def test_prompts_may_come_one_by_one(wrapped, tmp_path):
    """A generator was used up before the run; what holds no prompts ended in an AttributeError."""
    vlm, options = wrapped("llava_clip"), {"sites": RESIDUALS, "spans": "image"}
    assert len(extract(vlm, iter(some(3)), folder=tmp_path / "three", **options)) == 3
    assert len(extract(vlm, some(1)[0], folder=tmp_path / "one", **options)) == 1
    for given, told in ((load_pairs("scenes/colour", n=1), "give its .base"), (["a", "b"], "number 0 of the prompts")):
        with pytest.raises(UsageError, match=told):
            extract(vlm, given, folder=tmp_path / "none", **options)
    with pytest.raises(UsageError, match="batch_size 1.5"):
        extract(vlm, some(1), folder=tmp_path / "none", batch_size=1.5, **options)


def test_other_arguments_are_named(wrapped, tmp_path):
    vlm, prompts = wrapped("llava_clip"), some(4)
    extract(vlm, prompts, RESIDUALS, spans="last", folder=tmp_path)
    others = {
        "spans": {"spans": "image"},
        "pool": {"pool": None},
        "dtype": {"dtype": "float32"},
        "batch_size": {"batch_size": 3},
    }
    for name, other in others.items():
        with pytest.raises(UsageError, match=f"other arguments: {name} "):
            extract(vlm, prompts, RESIDUALS, **{"spans": "last", "folder": tmp_path} | other)
    with pytest.raises(UsageError, match="other arguments: prompts "):
        extract(vlm, some(4, seed=1), RESIDUALS, spans="last", folder=tmp_path)
    with pytest.raises(UsageError, match="other arguments: sites "):
        extract(vlm, prompts, RESIDUALS[:1], spans="last", folder=tmp_path)
    with pytest.raises(UsageError, match="other arguments: model "):
        extract(wrapped("internvl"), prompts, RESIDUALS, spans="last", folder=tmp_path)


def test_changed_and_missing_shards(wrapped, tmp_path):
    vlm, prompts = wrapped("llava_clip"), some(6)
    options = {"spans": "last", "folder": tmp_path, "batch_size": 2, "shard_mib": 1e-6}
    extract(vlm, prompts, RESIDUALS, **options)
    before = contents(tmp_path)
    path = tmp_path / "shard-00001.safetensors"
    path.write_bytes(before[path.name][:-1] + b"\x7f")
    with pytest.raises(WorkError, match="shard-00001"):
        Extracted.open(tmp_path).verify()
    with pytest.raises(WorkError, match="shard-00001"):
        extract(vlm, prompts, RESIDUALS, **options)
    path.unlink()
    with pytest.raises(UsageError, match="lacks shard-00001"):
        Extracted.open(tmp_path)
    extract(vlm, prompts, RESIDUALS, **options)
    assert contents(tmp_path) == before


def test_a_folder_with_other_files_is_left_alone(wrapped, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="notes.txt"):
        extract(wrapped("llava_clip"), some(2), RESIDUALS, spans="last", folder=tmp_path)
    with pytest.raises(UsageError, match="no extracted states"):
        Extracted.open(tmp_path)


@pytest.mark.parametrize("pool", ["mean", None])
def test_unreadable_images_are_listed(wrapped, tmp_path, pool):
    vlm, prompts = wrapped("llava_clip"), some(9)
    paths = [tmp_path / f"{number}.png" for number in range(9)]
    for path, prompt in zip(paths, prompts, strict=True):
        prompt.images[0].save(path)
    paths[2].unlink()
    paths[4].write_bytes(paths[4].read_bytes()[:100])
    paths[8].write_text("no picture")
    given = [Prompt(prompt.question, path) for prompt, path in zip(prompts, paths, strict=True)]
    options = {"spans": ("image", "last"), "pool": pool, "dtype": "float32", "batch_size": 2, "shard_mib": 1e-6}
    states = extract(vlm, given, RESIDUALS, folder=tmp_path / "states", **options)
    assert set(states.refused) == {2, 4, 8} and states.examples == (0, 1, 3, 5, 6, 7)
    assert "does not exist" in states.refused[2] and "cannot be read" in states.refused[4]
    for site in RESIDUALS:
        if pool == "mean":
            assert states[site].shape == (6, 2, 32) and states[site].isfinite().all()
            expected = by_hand(vlm, [prompts[3]], site, "image", 0)
            assert (states.pooled(site, "image")[2] - expected.mean(0)).abs().max() <= 1e-5
        else:
            assert torch.equal(states.whole(site, "last", 3), by_hand(vlm, [prompts[3]], site, "last", 0))
            with pytest.raises(UsageError, match="prompt 4 was refused"):
                states.whole(site, "last", 4)


def test_pictures_in_base64_are_told_apart(wrapped, tmp_path):
    """Other pictures are another extraction; as file names too long to look up they all were the same."""
    given = []
    for prompt in some(2):
        buffer = io.BytesIO()
        prompt.images[0].resize((200, 200)).save(buffer, "PNG")
        given.append(Prompt("what?", base64.b64encode(buffer.getvalue()).decode()))
    options = {"spans": "last", "folder": tmp_path / "states"}
    assert len(extract(wrapped("llava_clip"), given[:1], RESIDUALS, **options)) == 1
    with pytest.raises(UsageError, match="prompts"):
        extract(wrapped("llava_clip"), given[1:], RESIDUALS, **options)


def test_no_readable_image_at_all(wrapped, tmp_path):
    with pytest.raises(WorkError, match="no prompt has images that can be read"):
        extract(wrapped("llava_clip"), [Prompt("what?", "nowhere.png")], RESIDUALS, spans="last", folder=tmp_path)


def test_what_a_stream_does_not_have_is_refused_before_anything_runs(wrapped, tmp_path):
    vlm, folder = wrapped("llava_clip"), tmp_path / "states"
    hook, passes = killed_after(vlm, 0)
    text_only = [*some(3), Prompt("what is this?")]
    tower = Site("vision.resid_post", 1)
    refused = [
        (some(2), tower, "last", "has no span 'last'"),
        (some(2), (RESIDUALS[0], tower), ("image", "question"), "has no span 'question'"),
        (some(2), Site("projector.out"), "all", "has no span 'all'"),
        (some(2), tower, Words("circle"), "has no words"),
        (some(3), RESIDUALS[0], Words("circle"), "question of prompt 2"),
        (text_only, tower, "image", "prompt 3 has none"),
        (text_only, RESIDUALS[0], "image", "prompt 3 has none"),
        (some(2), Site("llm.resid_post", 9), "last", "out of range"),
        (some(2), RESIDUALS[0], Positions((999,)), "prompts 0, 1"),
        (some(2), RESIDUALS[0], Each(("last",)), "1 spans for 2 prompts"),
        (some(2), (), "last", "at least one"),
    ]
    for prompts, wanted, spans, message in refused:
        with pytest.raises(UsageError, match=message):
            extract(vlm, prompts, wanted, spans=spans, folder=folder)
    hook.remove()
    assert not passes and not folder.exists()


def test_spans_of_each_prompt_and_unions(wrapped, tmp_path):
    vlm, prompts, site = wrapped("llava_clip"), some(5), RESIDUALS[0]
    words = Each(tuple(Words("what") if number % 3 != 1 else Words("star") for number in range(5)))
    both = ("question", "last")
    states = extract(vlm, prompts, site, spans=(words, both), pool=None, folder=tmp_path, batch_size=2, dtype="float32")
    for span in (words, both):
        for example in range(5):
            found, expected = states.whole(site, span, example), by_hand(vlm, prompts, site, span, example)
            assert found.shape == expected.shape and (found - expected).abs().max() <= 2e-5


def test_means_of_a_half_precision_model_are_taken_in_float32(tmp_path):
    model, processor = ZOO["llava_clip"]("sdpa", 0)
    vlm, prompts, site = VLM(model.bfloat16(), processor, check=False), some(2), RESIDUALS[0]
    states = extract(vlm, prompts, site, spans="image", folder=tmp_path, dtype="float32")
    for example in range(2):
        expected = by_hand(vlm, prompts, site, "image", example)
        assert expected.dtype == torch.bfloat16
        assert (states[site][example, 0] - expected.float().mean(0)).abs().max() <= 1e-6


def test_prompts_with_and_without_images_keep_their_order(wrapped, tmp_path):
    vlm, prompts, site = wrapped("llava_clip"), some(5), RESIDUALS[1]
    prompts[2] = Prompt("what is this?")
    states = extract(vlm, prompts, site, spans="last", folder=tmp_path, batch_size=4, dtype="float32")
    for example, prompt in enumerate(prompts):
        expected = by_hand(vlm, [prompt], site, "last", 0)
        assert (states[site][example, 0] - expected[0]).abs().max() <= 2e-5


def test_values_that_a_data_type_cannot_hold(wrapped, tmp_path):
    vlm = wrapped("llava_clip")
    block = vlm.model.get_submodule("model.language_model.layers.3")
    for factor, message in ((1e6, "llm.resid_post\\[3\\] holds values up to"), (float("nan"), "not finite")):
        hook = block.register_forward_hook(lambda module, given, out, factor=factor: out * factor)
        with pytest.raises(WorkError, match=message):
            extract(vlm, some(2), RESIDUALS, spans="last", folder=tmp_path)
        hook.remove()
    assert not list(tmp_path.iterdir())


def test_the_pass_ends_after_the_last_site_and_leaves_no_hook(wrapped, tmp_path):
    vlm, called = wrapped("llava_clip"), []
    names = ("model.language_model.layers.1", "model.language_model.layers.2", "lm_head", "model.multi_modal_projector")
    watches = [
        vlm.model.get_submodule(name).register_forward_hook(lambda module, given, out, name=name: called.append(name))
        for name in names
    ]
    extract(vlm, some(2), Site("llm.resid_post", 1), spans="last", folder=tmp_path / "decoder")
    assert called == ["model.multi_modal_projector", "model.language_model.layers.1"]
    called.clear()
    extract(vlm, some(2), Site("vision.resid_post", 1), spans="image", folder=tmp_path / "tower")
    assert called == []
    for watch in watches:
        watch.remove()
    block = vlm.model.get_submodule(names[0])
    before = len(block._forward_hooks), len(block._forward_pre_hooks)
    extract(vlm, some(2), sites("llm.resid_pre", (1, 2)), spans="last", folder=tmp_path / "again")
    assert (len(block._forward_hooks), len(block._forward_pre_hooks)) == before


def live(vlm: VLM) -> list[torch.Tensor]:
    """Tensors that someone holds, but for those of the model."""
    own = {id(tensor) for tensor in (*vlm.model.parameters(), *vlm.model.buffers())}
    return [value for value in gc.get_objects() if type(value) is torch.Tensor and id(value) not in own]


def test_memory_does_not_grow_with_the_number_of_prompts(wrapped, tmp_path):
    vlm, peaks = wrapped("llava_clip"), []
    gc.collect()
    others = sum(tensor.nbytes for tensor in live(vlm))

    def weigh(module, given) -> None:
        peaks[-1] = max(peaks[-1], sum(tensor.nbytes for tensor in live(vlm)) - others)

    everything = sites("llm.resid_post", vlm.llm_layers)
    hook = vlm.model.get_submodule("model.language_model.layers.0").register_forward_pre_hook(weigh)
    sizes = []
    for n_prompts in (12, 72):
        peaks.append(0)
        folder = tmp_path / str(n_prompts)
        options = {"spans": "all", "pool": None, "batch_size": 2, "dtype": "float32", "shard_mib": 0.05}
        extract(vlm, some(n_prompts), everything, folder=folder, **options)
        sizes.append(sum(path.stat().st_size for path in folder.glob("shard-*")))
    hook.remove()
    one_batch = sum(value.nbytes for value in vlm.encode(some(2)).inputs.values())
    assert peaks[1] <= peaks[0] + one_batch, "the batch made ahead may or may not be there"
    assert sizes[1] - sizes[0] > 2 * (peaks[0] + one_batch)


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_5_vl"])
def test_a_pass_ended_early_leaves_nothing_behind(wrapped, tmp_path, family):
    """The exception that ends it must not keep the frames it passed through, with their tensors, until a collection."""
    vlm, outputs = wrapped(family), []

    def watch(module, given, out) -> None:
        if type(out) is torch.Tensor:
            outputs.append(weakref.ref(out))

    hooks = [module.register_forward_hook(watch) for module in vlm.model.modules()]
    gc.collect()
    gc.disable()
    try:
        extract(vlm, some(4), RESIDUALS, spans="image", folder=tmp_path, batch_size=2)
        assert len(outputs) > 50 and all(output() is None for output in outputs)
    finally:
        gc.enable()
        for hook in hooks:
            hook.remove()


def test_nothing_larger_than_a_mean_is_kept(wrapped, tmp_path, monkeypatch):
    from vlm_mech.extraction import extract as module

    vlm, prompts, largest = wrapped("llava_clip", "eager"), some(2), []
    gc.collect()
    known = {id(tensor) for tensor in live(vlm)}
    kept_by_hand = module._kept

    def spy(request, ready, places):
        out = kept_by_hand(request, ready, places)
        known.update(id(value) for value in ready.encoded.inputs.values())
        known.update(id(part) for cells in ready.cells.values() for part in (cells.rows, cells.positions))
        largest.append(max(tensor.numel() for tensor in live(vlm) if id(tensor) not in known))
        return out

    monkeypatch.setattr(module, "_kept", spy)
    extract(vlm, prompts, sites("llm.resid_post", vlm.llm_layers), spans=("image", "last"), folder=tmp_path)
    assert largest == [2 * 2 * vlm.width(RESIDUALS[0])]
    assert not vlm.config.output_attentions and not vlm.config.output_hidden_states
