"""The run contract through the layer swap: files, repeating, resuming, one-line errors, pairs of the user's own."""

import dataclasses
import json
import re

import pandas as pd
import pytest

from experiments import layer_swap
from tests.helpers import assert_help_tells, command, killed_at, options
from tests.zoo.tiny import picture
from vlm_mech.data.pairs import load_pairs
from vlm_mech.methods.layer_swap import layer_swap as one_call
from vlm_mech.methods.layer_swap import study
from vlm_mech.models.vlm import VLM
from vlm_mech.results import figures
from vlm_mech.results.result import Result

QUESTIONS = ("what colour is the circle?", "is the red star left of the blue circle?", "what is the <script>?")


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """Six usable pairs, one with a broken image, one whose answers begin alike."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(8):
        for name, seed in (("a", number), ("b", 50 + number)):
            picture(seed).save(folder / f"{number}{name}.png")
        answers = ("red", "blue") if number != 5 else ("red", "red star")
        rows.append(
            {
                "id": f"pair {number}",
                "image": f"{number}a.png",
                "counterfactual_image": f"{number}b.png",
                "question": QUESTIONS[number % 3],
                "answer": answers[0],
                "counterfactual_answer": answers[1],
            }
        )
    (folder / "3b.png").write_text("no picture")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def finished(model_folder, data_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    assert command(layer_swap, *options(model_folder, data_folder, out)) == 0
    return out


def test_a_run_leaves_what_the_contract_says(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "result.parquet", "result.json", "claims.json", "summary.csv", "config.json", "provenance.json", "figures",
        "report.html",
    }  # fmt: skip
    summary = pd.read_csv(finished / "summary.csv")
    assert {"n", "mean", "ci_low", "ci_high", "baseline"} <= set(summary.columns)
    assert len(summary) == 2 * 4 * 4 * 3
    provenance = json.loads((finished / "provenance.json").read_text())
    assert provenance["versions"]["nnsight"] and provenance["model"]["weights"] and provenance["data"]["hash"]
    assert provenance["receipts"]["receipts"] == 3 * 2 * 4 * 4
    refused = {row["id"]: row["reason"] for row in provenance["refused"]}
    assert "cannot be read" in refused["pair 3"] and "do not part: one begins the other" in refused["pair 5"]
    for name in provenance["figures"]:
        assert (finished / "figures" / f"{name}.json").stat().st_size > 10_000
    assert sum(path.stat().st_size for path in finished.rglob("*") if path.is_file()) < 6_000_000


def test_one_call_leaves_out_and_tells_what_the_experiment_does(finished, model_folder, data_folder):
    saved = Result.load(finished)
    vlm, pairs = VLM.load(str(model_folder)), load_pairs(data_folder)
    result = one_call.layer_swap(vlm, pairs, only_correct=False, batch=2)
    pd.testing.assert_frame_equal(result.table, saved.table)
    told = ("question", "model", "data", "refused", "receipts", "answers")
    assert set(told) <= set(result.provenance)
    assert result.provenance == {key: saved.provenance[key] for key in result.provenance}
    assert result.provenance["data"]["n"] == 6 and len(result.provenance["refused"]) == 2
    assert result.findings == saved.findings and "2 examples could not be used: pair 3" in result.findings[-1]


def test_figures_are_redrawn_from_the_saved_file_alone(finished):
    result = Result.load(finished)
    again = figures.heatmap(result, x="layer", y="span", metric="recovered", facet="direction")
    assert json.loads(again.to_json()) == json.loads((finished / "figures" / "recovered_heatmap.json").read_text())


def test_the_report_is_self_contained_and_escaped(finished):
    page = (finished / "report.html").read_text()
    assert "<script>?" not in page and "&lt;script&gt;?" in page
    outside = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)\s*=\s*[\"']?(?:https?:)?//[^>]*>", page)
    assert not outside and page.count('src="data:image/webp;base64') == 8
    assert "6 of 6 pairs" in page and "2 examples could not be used: pair 3: image " in page


def test_a_saved_config_repeats_the_numbers(finished, tmp_path):
    assert command(layer_swap, "--config", finished / "config.json", "--out", tmp_path / "again") == 0
    assert (tmp_path / "again" / "result.parquet").read_bytes() == (finished / "result.parquet").read_bytes()
    assert (tmp_path / "again" / "summary.csv").read_bytes() == (finished / "summary.csv").read_bytes()
    assert command(layer_swap, "--config", finished / "config.json", "--n", "4", "--out", tmp_path / "some") == 0
    some = Result.load(tmp_path / "some")
    assert 2 <= some.table["example"].nunique() <= 4
    assert some.provenance["data"]["drawn"] == "4 of 8 rows, drawn with seed 0"


def test_a_killed_run_resumes_to_the_same_bytes(model_folder, data_folder, finished, tmp_path, monkeypatch, capsys):
    calls = killed_at(monkeypatch, study, "swap_states", 3)
    assert command(layer_swap, *options(model_folder, data_folder, tmp_path / "out")) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "result.parquet").exists()
    assert command(layer_swap, *options(model_folder, data_folder, tmp_path / "out", "--resume", "--seed", "5")) == 2
    assert "had other options: seed" in capsys.readouterr().err
    assert command(layer_swap, *options(model_folder, data_folder, tmp_path / "out", "--resume")) == 0
    assert len(calls) == 4, "the two finished batches are not run again"
    assert (tmp_path / "out" / "result.parquet").read_bytes() == (finished / "result.parquet").read_bytes()
    assert not (tmp_path / "out" / "partial").exists()


def test_nothing_is_overwritten_unless_asked_and_then_only_our_own(model_folder, data_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(layer_swap, *options(model_folder, data_folder, out, "--n", "4")) == 0
    (out / "notes.txt").write_text("mine")
    (out / "figures" / "mine.html").write_text("mine")
    before = (out / "result.parquet").read_bytes()
    assert command(layer_swap, *options(model_folder, data_folder, out, "--n", "8")) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (out / "result.parquet").read_bytes() == before
    assert command(layer_swap, *options(model_folder, data_folder, out, "--n", "8", "--overwrite")) == 0
    assert Result.load(out).table["example"].nunique() == 6
    assert (out / "notes.txt").read_text() == (out / "figures" / "mine.html").read_text() == "mine"
    assert command(layer_swap, *options(model_folder, data_folder, tmp_path / "none", "--resume")) == 2
    assert "there is no run to resume" in capsys.readouterr().err


@pytest.mark.parametrize("site", ["projector", "vision"])
def test_the_other_sites(model_folder, data_folder, tmp_path, site):
    assert command(layer_swap, *options(model_folder, data_folder, tmp_path / site, "--site", site)) == 0
    result = Result.load(tmp_path / site)
    assert result.axes[-1] == ("point" if site == "projector" else "layer")


def test_eager_and_sdpa_give_the_same_table(model_folder, data_folder, finished, tmp_path):
    assert command(layer_swap, *options(model_folder, data_folder, tmp_path / "eager", "--attn", "eager")) == 0
    sdpa, eager = Result.load(finished).table, Result.load(tmp_path / "eager").table
    assert (sdpa["logit_diff"] - eager["logit_diff"]).abs().max() < 1e-5


WRONG = [
    (["--model", "no-such-model"], 2, "neither an embedded model"),
    (["--data", "scenes/nothing"], 2, "pair set 'nothing' is not known; use one of colour"),
    (["--data", "no-such-folder"], 2, "neither a folder with pairs.jsonl nor one of scenes/colour"),
    (["--n", "0"], 2, "at least one pair is needed"),
    (["--n", "many"], 2, "--n"),
    (["--attn", "flash_attention_2"], 2, "--attn"),
    (["--device", "gpu"], 2, "device 'gpu' is not usable here"),
    (["--spans", "image", "image"], 2, "the span 'image' is given twice; once is needed"),
    (["--n", "1"], 2, "--n is 1; at least 2 examples are needed"),
    (["--spans", "picture"], 2, "span 'picture' is not known here; named spans"),
    (["--banana"], 2, "--banana"),
    (["--config", "missing.json"], 2, "config 'missing.json' cannot be read"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), WRONG)
def test_wrong_use_is_one_clear_line(model_folder, data_folder, tmp_path, capsys, arguments, status, message):
    assert command(layer_swap, *options(model_folder, data_folder, tmp_path / "out"), *arguments) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error
    assert "Traceback" not in error


def test_failed_work_is_one_clear_line_and_status_one(model_folder, data_folder, tmp_path, capsys):
    usual = [each for each in options(model_folder, data_folder, tmp_path / "out") if each != "--all"]
    assert command(layer_swap, *usual) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "are answered correctly on both images; at least two are needed" in error
    assert not (tmp_path / "out").exists(), "nothing was measured"
    assert command(layer_swap, *usual, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_folders_of_pairs_that_are_none(tmp_path, model_folder, capsys):
    (tmp_path / "pairs.jsonl").write_text('{"image": "a.png"}\n')
    assert command(layer_swap, "--model", model_folder, "--data", tmp_path, "--out", tmp_path / "out") == 2
    assert "line 1: counterfactual_image is missing; an image is needed" in capsys.readouterr().err
    (tmp_path / "pairs.jsonl").write_text("{not json}\n")
    assert (
        command(layer_swap, "--model", model_folder, "--data", tmp_path, "--out", tmp_path / "out", "--overwrite") == 2
    )
    assert "line 1 is not JSON" in capsys.readouterr().err


def test_counterfactuals_with_other_tokens_are_refused_with_the_reason(vlm):
    """Prompts of unlike length cannot arise from one question here, so the processor is made to give them."""
    from vlm_mech.data.fitting import fitting
    from vlm_mech.data.pairs import Pair, Pairs
    from vlm_mech.errors import UsageError

    pairs = Pairs("pictures", (Pair("one", picture(1), picture(2), "what is this?", "red", "blue"),))
    encode, vlm_encode = vlm.encode, []

    def longer(prompt):
        from vlm_mech.inputs.prompt import Prompt

        vlm_encode.append(prompt)
        return encode(prompt if len(vlm_encode) % 2 else Prompt("what is this circle?", prompt.image))

    vlm.encode = longer
    try:
        with pytest.raises(
            UsageError, match=r"the prompts have 25 and 26 tokens; counterfactuals need the same tokens"
        ):
            fitting(vlm, pairs)
    finally:
        del vlm.encode


def test_help_shows_what_states_need_before_what_weights_need():
    names = [field.name for field in dataclasses.fields(layer_swap.Config)]
    states = ("swap", "site", "point", "spans", "direction", "control", "split", "all", "batch")
    weights = ("tuned", "second", "part", "schedules", "window", "n_random")
    start = names.index("swap")
    assert tuple(names[start:]) == (*states, *weights, "engine")


def test_help_is_quick_and_imports_no_torch():
    assert_help_tells(layer_swap, ("--model", "--resume"))
