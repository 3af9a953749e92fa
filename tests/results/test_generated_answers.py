"""What is told of generated answers: whose they are, and how often the logits agree, controls apart from edges."""

import pandas as pd
import pytest

from vlm_mech.results.generated_answers import MOST_ROWS, agreement, examples, told

CUTS = ("edge", "control")


def spoken(n=6):
    """Under an edge the own answer is said though the logits prefer the other; under its control both agree.

    The first example has no control, and of the last one nothing was generated.
    """
    rows = []
    for example in range(n):
        for cut in CUTS[::-1] if example == 1 else CUTS:
            edge, missing = cut == "edge", example == 0 and cut == "control"
            rows.append(
                {
                    "example": f"pair {example}", "group": f"pair {example}", "cut": cut, "layer": 0,
                    "says": None if missing or example == n - 1 else "own", "flip": None if missing else float(edge),
                    "says_baseline": None if missing or example == n - 1 else "own", "flip_baseline": 0.0,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def test_edges_and_controls_are_not_pooled():
    found = agreement(spoken(), apart=("cut",)).summary("agrees").set_index("run")
    assert list(found.index) == ["edited (edge)", "edited (control)", "unedited"]
    assert found["mean"].tolist() == [0.0, 1.0, 1.0] and found["n"].tolist() == [5, 4, 5]
    pooled = agreement(spoken()).summary("agrees").set_index("run")
    assert pooled.loc["edited", "mean"] == pytest.approx((0 + 4 * 0.5) / 5)


def test_each_has_a_sentence():
    _, *lines = told(spoken(), ("cut", "layer"), "logit_diff", apart=("cut",))
    begins = ("edited runs (edge): of the", "edited runs (control): of the", "unedited runs: of the")
    assert [line.startswith(begin) for line, begin in zip(lines, begins, strict=True)] == [True] * 3
    assert "0 % name what logit_diff prefers" in lines[0] and "n = 4" in lines[1]
    assert told(spoken().drop(columns="says"), ("cut", "layer"), "logit_diff", apart=("cut",)) == ()


def written(n_cells, n=6):
    """Of six examples of each cell the edit changes the last two alone; of a further cell nothing was generated."""
    rows = [
        {
            "example": f"pair {example}", "cut": "edge", "layer": layer, "flip": 0.0, "text_baseline": "left",
            "text": "left" if example < 4 else "right", "says": ("own" if example < 4 else "other") if layer else None,
        }
        for layer in range(n_cells + 1) for example in range(n)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_a_few_answers_of_each_cell_are_shown_changed_ones_and_others():
    questions = {f"pair {example}": f"where is {example}?" for example in range(6)}
    shown = examples(written(8), ("cut", "layer"), questions)
    named = ["question", "without the edit", "with the edit", "whose answer"]
    assert list(shown.columns) == ["cut", "layer", *named]
    assert shown.groupby("layer").size().to_dict() == dict.fromkeys(range(1, 9), 2)
    first = shown[shown["layer"] == 1][named].values.tolist()
    assert first == [["where is 4?", "left", "right", "other"], ["where is 0?", "left", "left", "own"]]
    assert len(examples(written(2), ("cut", "layer"), questions)) == 12, "no more than there are"
    many = examples(written(30), ("cut", "layer"), questions)
    assert len(many) == MOST_ROWS and many["layer"].is_unique
    assert examples(written(2).drop(columns="says"), ("cut", "layer"), questions) is None
