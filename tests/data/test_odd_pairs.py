"""Every behavioural command on a user's folder in which some pairs are unusual and some cannot be used."""

import json
import zlib

import pytest
from PIL import Image

from experiments import (
    blur_decay,
    contrastive_tuning,
    debias,
    decode,
    erroneous_agreement,
    horizon,
    layer_swap,
    score,
    steer,
    visual_flow,
)
from tests.helpers import command
from vlm_mech.data.pairs import load_pairs

REASONS = {
    "missing": "does not exist",
    "corrupt": "cannot be read",
    "huge": "decompression bomb",
    "same": "both images have the same pixels",
    "tokens": "do not part: one begins the other",
    "special": "holds '<image>'",
    "long": "has positions for 256",
}
"""Pairs that no model can be asked, and why."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pairs that can be used (one each grey, transparent, of unequal size, large) among those that cannot."""
    found = tmp_path_factory.mktemp("odd")
    rows = []
    names = [*REASONS, "plain", "grey", "alpha", "unequal", "large", "turned"]
    for name, pair in zip(names, load_pairs("scenes/colour-conflict", n=len(names)), strict=True):
        first, second = pair.image, pair.counterfactual_image
        kind = "png"
        if name == "grey":
            first, second = first.convert("L"), second.convert("L")
        elif name == "alpha":
            first = first.convert("RGBA")
        elif name == "unequal":
            second = second.resize((150, 70))
        elif name == "large":
            first, second = (each.resize((1500, 1500), Image.Resampling.NEAREST) for each in (first, second))
        elif name == "same":
            second = first
        elif name == "turned":
            kind = "jpg"
        for image, side in ((first, "a"), (second, "b")):
            image.save(found / f"{name}{side}.{kind}")
        row = {"id": name, "image": f"{name}a.{kind}", "counterfactual_image": f"{name}b.{kind}"}
        row |= {"question": pair.question, "answer": pair.answer, "counterfactual_answer": pair.counterfactual_answer}
        row |= {"conflict": pair.conflict}
        row |= {"counterfactual_answer": f"{pair.answer} star"} if name == "tokens" else {}
        row |= {"question": f"{pair.question} <image>"} if name == "special" else {}
        row |= {"question": f"{pair.question} " * 60} if name == "long" else {}
        rows.append(row)
    (found / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found / "missingb.png").unlink()
    (found / "corruptb.png").write_bytes((found / "corruptb.png").read_bytes()[:200])
    whole = bytearray((found / "hugea.png").read_bytes())
    whole[16:24] = (60_000).to_bytes(4, "big") * 2
    whole[29:33] = zlib.crc32(bytes(whole[12:29])).to_bytes(4, "big")
    (found / "hugea.png").write_bytes(whole)
    return found


RUNS = {
    erroneous_agreement: ("--caption", "a {answer} circle"),
    score: ("--n-validation", "2", "--forms", "generation"),
    debias: ("--objective", "supervised", "--steps", "1", "--every", "1", "--batch", "1", "--untouched", "none"),
    decode: ("--alphas", "1", "--rates", "0.5", "--strengths", "1", "--methods", "M3ID"),
    blur_decay: ("--kernels", "1", "61", "--mechanism", "none"),
    visual_flow: ("--no-probe", "--pages", "0"),
    horizon: ("--exchange", "none", "--all", "--gates", "none"),
    layer_swap: ("--swap", "weights", "--schedules", "suffix"),
    steer: (
        "--shares", "0.33", "0.33", "--layers", "3", "--doses", "-2", "0", "2", "--n-random", "1", "--n-others", "0",
        "--n-side", "0", "--generate", "0", "--gates", "none",
    ),
    contrastive_tuning: (
        "--caption", "a {answer} circle", "--train", "scenes/left-right", "--n-train", "12", "--n-validation", "4",
        "--variants", "locked: captions", "--steps", "1", "--batch", "4", "--rates", "1e-3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("experiment", RUNS, ids=lambda each: each.__name__.rpartition(".")[2])
def test_what_cannot_be_used_is_counted_with_its_reason_and_the_rest_is_asked(experiment, folder, tmp_path, capsys):
    assert command(experiment, "--data", folder, *RUNS[experiment], "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    told = json.loads((tmp_path / "run" / "provenance.json").read_text())
    refused = {row["id"].rpartition("/")[2]: row["reason"] for row in told["refused"]}
    for name, reason in REASONS.items():
        # Answers that are generated, or tuned on, may begin alike.
        assert (experiment in (score, debias) and name == "tokens") or reason in refused[name]
    assert f"{len(refused)} examples could not be used: " in said and "more in provenance.json" in said
    assert not {"plain", "grey", "alpha", "large", "turned"} & set(refused)


def test_pairs_of_two_sizes_have_no_object_for_probes(folder, tmp_path):
    """The map asks about them all the same where it fits no probes."""
    ids = [
        {pair.id for pair in visual_flow._loaded(visual_flow.Config(data=str(folder), probe=probe))[1].pairs}
        for probe in (True, False)
    ]
    assert ids[1] - ids[0] == {"unequal"}
    given = ["--data", folder, "--kernels", "1", "61", "--mechanism", "61", "--probe-data", "scenes/colour"]
    for more, missing in (([], {"unequal"}), (["--no-probe"], set())):
        assert command(blur_decay, *given, *more, "--out", tmp_path / f"run{len(more)}") == 0
        told = json.loads((tmp_path / f"run{len(more)}" / "provenance.json").read_text())
        assert {row["id"] for row in told["refused"]} - set(REASONS) == missing
        assert "unequal" not in missing or "the same size is needed" in told["refused"][-1]["reason"]


@pytest.mark.parametrize("field", ["answer", "counterfactual_answer", "question", "image"])
def test_an_empty_field_is_one_line(folder, tmp_path, field, capsys):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(rows[-1] | {field: " "}))
    for experiment in RUNS:
        assert command(experiment, "--data", tmp_path, "--out", tmp_path / "run") == 2
        error = capsys.readouterr().err
        needed = "an image is needed" if field == "image" else "a non-empty text is needed"
        assert f"line 1: {field} is ' '; {needed}" in error and error.count("\n") == 1
