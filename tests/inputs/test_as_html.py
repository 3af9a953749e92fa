"""What a notebook shows of prompts, data, interventions, passes and states; text of the user's is escaped."""

import re

import numpy as np
from PIL import Image

from vlm_mech import (
    VLM,
    Ablate,
    Item,
    Items,
    Knockout,
    Prompt,
    Remove,
    Replace,
    Site,
    extract,
    load_pairs,
    run,
    sites,
)
from vlm_mech.inputs.as_html import N_SHOWN, SIDE

EVIL = "<script>alert(1)</script>?"


def images(shown: str) -> list[tuple[int, int]]:
    return [(int(w), int(h)) for w, h in re.findall(r"<img width='(\d+)' height='(\d+)'", shown)]


def test_prompts_data_and_states_are_shown_and_nothing_is_run_in_the_page(tmp_path):
    grey = Image.fromarray(np.full((40, 80, 3), 128, np.uint8))
    shown = Prompt(EVIL, (grey, grey))._repr_html_()
    assert images(shown) == [(SIDE, SIDE // 2)] * 2 and "<script>" not in shown and "&lt;script&gt;" in shown
    pairs = load_pairs("scenes/colour", n=N_SHOWN + 2)
    shown = pairs._repr_html_()
    assert len(images(shown)) == 2 * N_SHOWN and "and 2 more" in shown and pairs.pairs[0].answer in shown
    assert repr(pairs) == f"Pairs('scenes/colour': {N_SHOWN + 2} pairs, 0 refused)"
    gone = Items("mine", (Item("a", "no/such.png", EVIL, "<b>"),))
    shown = gone._repr_html_()
    assert (
        "no/such.png" in shown
        and "<script>" not in shown
        and "<td style='text-align:left;vertical-align:top'><b>" not in shown
    )
    vlm = VLM.load("organism", check=False)
    encoded = vlm.encode(pairs.base[:2])
    shown = encoded._repr_html_()
    assert shown.count("36 image tokens") == 2 and "question" in shown and len(images(shown)) == 2
    done = run(vlm, encoded, Ablate(Site("llm.resid_post", 1), "image"))
    said = [vlm.tokenizer.decode(row.argmax()) for row in done.last]
    assert all(f"{word!r}".strip("'") in done._repr_html_() for word in said) and "1 receipts" in done._repr_html_()
    how = {"folder": tmp_path / "states", "spans": ["last"]}
    states = extract(vlm, pairs.base[:2], sites("llm.resid_post", range(3)), **how)
    assert "<td style='text-align:left;vertical-align:top'>0, 1, 2</td>" in states._repr_html_()


def filled(shown: str) -> list[list[int]]:
    """Numbers of the filled squares of each strip."""
    strips = re.findall(r"<svg.*?</svg>", shown)
    return [[int(n) for n in re.findall(r"fill='#d55e00'><title>block (\d+)<", strip)] for strip in strips]


def test_interventions_are_drawn_on_the_blocks_that_they_edit():
    both = Knockout("last", "image", (2, 3, 4), heads=(1,)) & Ablate(sites("llm.attn_out", (0, 5)), "question")
    shown = both._repr_html_()
    assert filled(shown) == [[2, 3, 4], [0, 5]] and "2 to 4" in shown and "heads 1" in shown
    assert "&#x27;last&#x27; &lt;- &#x27;image&#x27;" in shown
    (all_later,) = filled(Remove("image", 9)._repr_html_())
    assert all_later == [9, 10, 11] and "9 and later" in Remove("image", 9)._repr_html_()
    assert filled(Remove("image", 2, until=4)._repr_html_()) == [[2, 3]]
    none = Replace(Site("projector.out"), "image", source=[Prompt("x?")])._repr_html_()
    assert "no block" in none and "projector" in none
