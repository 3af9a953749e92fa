"""What `help` and a notebook show of the public names: every argument is told, in words that a reader can look up."""

import functools
import inspect
import pydoc
import re
from pathlib import Path

import pytest

import vlm_mech
from vlm_mech import VLM, DualEncoder, Knockout, generate, load_pairs, run

ROOT = Path(__file__).parents[1]
FUNCTIONS = [name for name in vlm_mech.__all__ if inspect.isfunction(getattr(vlm_mech, name))]
WORDS = {"generated", "shuffled", "tokenizer", "chosen", "estimate"}
"""Names of spans, controls, attributes and columns that are names of something within the library too."""
CLASSES = [name for name in vlm_mech.__all__ if inspect.isclass(getattr(vlm_mech, name))]


@pytest.mark.parametrize("name", ["Span", "Receipt"])
def test_a_union_says_what_it_is(name):
    shown = pydoc.plain(pydoc.render_doc(getattr(vlm_mech, name)))
    words = {"Span": ["Words", "Patches", "answer_prompt", "union"], "Receipt": ["WriteReceipt", "KnockoutReceipt"]}
    assert [word for word in words[name] if word not in shown] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_optional_argument_is_told(name):
    function = getattr(vlm_mech, name)
    optional = [each.name for each in inspect.signature(function).parameters.values() if each.kind == each.KEYWORD_ONLY]
    assert [each for each in optional if not re.search(rf"\b{each}\b", function.__doc__ or "")] == []


def documented(name):
    """The docstrings of a public name and of the public methods of a class."""
    value = getattr(vlm_mech, name)
    inner = [value.__dict__[each] for each in vars(value) if not each.startswith("_")] if name in CLASSES else []
    return " ".join(each.__doc__ or "" for each in (value, *inner) if isinstance(each.__doc__, str))


@functools.cache
def hidden():
    """Names of the library that nobody outside it can see."""
    texts = [path.read_text() for path in (ROOT / "vlm_mech").rglob("*.py")]
    ours = {found for text in texts for found in re.findall(r"^(?:def |class |)(\w+)(?:\(| = |:)", text, re.MULTILINE)}
    seen = {member for each in CLASSES for member in dir(getattr(vlm_mech, each))} | set(vlm_mech.__all__)
    seen |= {member for each in vlm_mech._MODULES for member in getattr(vlm_mech, each).__all__}
    seen |= {argument for each in FUNCTIONS + CLASSES for argument in arguments(getattr(vlm_mech, each))}
    return ours - seen


@pytest.mark.parametrize("name", FUNCTIONS + CLASSES)
def test_docstrings_point_to_what_can_be_seen(name):
    """A name of the library in backticks is public; what is not public is said in words."""
    named = {each.rpartition(".")[2] for each in re.findall(r"`([A-Za-z_][\w.]*)`", documented(name))}
    assert named & hidden() - WORDS == set()


def arguments(value):
    """Arguments of a function, and of a class and its methods."""
    try:
        return list(inspect.signature(value).parameters)
    except ValueError:
        return []


def test_a_batch_and_a_run_are_shown_on_one_line():
    pairs, vlm, clip = load_pairs("scenes/colour", n=2), VLM.load("organism", check=False), DualEncoder.load("clip")
    encoded = vlm.encode(pairs.base)
    n_pos = encoded.n_pos
    assert repr(encoded) == f"Encoded(2 prompts x {n_pos} positions, 2 images)"
    done = run(vlm, encoded, Knockout("last", "image", layers=1))
    size = " x ".join(map(str, done.logits.shape))
    assert repr(done) == f"Run(logits {size}, 1 receipt; {encoded!r})"
    batch = clip.encode([pair.image for pair in pairs], ["a red circle", "a green circle", "a blue circle"])
    assert repr(batch) == "DualEncoded(2 images, 3 texts)"
    assert repr(run(clip, batch)) == f"Run(logits 2 x 3, 0 receipts; {batch!r})"
    assert len(repr(generate(vlm, encoded))) < 1000
