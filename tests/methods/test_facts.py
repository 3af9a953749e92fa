"""The page about facts: the rule of a reading layer and of agreement, on made rows and on models."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from experiments import facts as experiment
from tests.helpers import command
from tests.models.test_language_models import write_gguf
from vlm_mech.methods.facts import figures, findings, study
from vlm_mech.methods.facts.data import ATTRIBUTION, EXPECTED, HEADS, KNOCKOUT, LAST, PARTS, SUBJECT, SWAP, check_parts
from vlm_mech.methods.facts.parts import CALLS, NO_HEAD, READ
from vlm_mech.methods.knockout.claims import NEEDED
from vlm_mech.methods.layer_swap.claims import NO_LONGER, TURNS, kind_of
from vlm_mech.results.claim import Claim, Condition, Tested
from vlm_mech.results.result import Result

N_LAYERS, READS, N = 8, 5, 24


def rows_of(part, line, means, head=NO_HEAD):
    """A row a pair and layer: these means, with noise."""
    random = np.random.default_rng(len(part) + len(line))
    made = [
        {"example": f"e{number}", "group": f"g{number // 2}", "part": part, "line": line, "layer": layer, "head": head}
        | {"change": mean + 0.1 * random.normal(), "change_baseline": 0.0}
        for layer, mean in enumerate(means)
        for number in range(N)
    ]
    return pd.DataFrame(made)


def a_claim(kind, layer, **about):
    told = (Tested(12, -3.0, -4.0, -2.0, 0.001),)
    condition = (Condition("logit_diff", {}, "below", 0.1),)
    return Claim(kind, {"layer": layer} | about, f"{kind} at layer {layer}", condition, "logits", told, told, 0.01)


def page(reads_heads=READS):
    """What methods leave where a layer reads, as the rows of a page, and their claims."""
    early = [-4.0 if layer < READS else 0.0 for layer in range(N_LAYERS)]
    peak = [-3.0 if layer == reads_heads else 0.0 for layer in range(N_LAYERS)]
    rows = [
        rows_of(KNOCKOUT, READ, [-3.0 if abs(layer - READS) <= 2 else 0.0 for layer in range(N_LAYERS)]),
        rows_of(SWAP, SUBJECT, early),
        rows_of(SWAP, LAST, [-4.0 - each for each in early]),
        rows_of(HEADS, "all heads", peak),
        rows_of(ATTRIBUTION, "estimate", peak, head=1),
    ]
    claims = {
        KNOCKOUT: (a_claim(NEEDED, READS, edge=READ), a_claim(NEEDED, 1, edge="last<-rest")),
        SWAP: (a_claim(kind_of(SUBJECT, NO_LONGER), READS), a_claim(kind_of(LAST, TURNS), READS)),
        HEADS: (a_claim(NEEDED, reads_heads, edge=READ, head=3),),
        ATTRIBUTION: (a_claim("exchange lowers", reads_heads, head=1),),
    }
    return study.result_of(pd.concat(rows), {"not asked": {}}), claims


def test_methods_name_the_layer_that_reads_and_agree():
    result, claims = page()
    found = study.readings(result, claims, n_layers=N_LAYERS)
    by_line = {each.rule.line: each for each in found}
    assert [by_line[line].layer for line in (SUBJECT, LAST, "all heads", "estimate")] == [READS] * 4
    assert all((each.low, each.high) == (READS, READS) for each in found if each.rule.part != KNOCKOUT)
    assert (
        by_line[READ].low >= READS - 2 and by_line[READ].claimed == (READS,) and by_line["all heads"].heads == ("L5H3",)
    )
    assert READS in study.agreed(found) and all(each.late and each.n == N // 2 for each in found)
    table = study.as_table(found)
    assert set(table["method"]) == set(claims) and table["literature"].tolist() == [
        EXPECTED[m] for m in table["method"]
    ]
    assert findings.agreement(found).startswith("Agreement: the intervals of knockout, swap, heads, attribution have")
    assert any(
        text.startswith("heads: ") and "layer 5 (95 % of resamples: 5 to 5)" in text for text in findings.where(found)
    )


def test_methods_that_name_others_or_nothing_do_not_agree():
    apart = study.readings(*page(reads_heads=1), n_layers=N_LAYERS)
    assert study.agreed(apart) == () and "have no layer in common" in findings.agreement(apart)
    assert any("in the lower half of the decoder, earlier than reported" in text for text in findings.where(apart))
    result, claims = page()
    silent = study.readings(result, claims | {HEADS: ()}, n_layers=N_LAYERS)
    assert study.agreed(silent) == () and "heads makes no claim" in findings.agreement(silent)
    none = study.readings(result, {}, n_layers=N_LAYERS)
    assert all(each.layer is None for each in none) and findings.where(none)[0].startswith(
        "No claim about where the answer is read"
    )
    assert study.as_table(none)["layer"].isna().all() and "None of" in findings.agreement(none)


def test_the_layer_of_the_extreme_mean_and_its_interval():
    values = np.array([[0.0, 3.0, 0.0]] * 6 + [[0.0, 0.0, 2.0]] * 4)
    layers, groups = np.array([2, 4, 7]), np.arange(10)
    own, low, high, share = study.extreme(values, layers, groups, sign=1)
    assert (own, low, high) == (4, 4, 7) and 0.5 < share < 1
    assert study.extreme(-values, layers, groups, sign=-1) == (own, low, high, share)
    # From layer to layer: the largest rise, named by where it ends.
    assert study.extreme(np.array([[0.0, 1.0, 5.0]] * 3), layers, np.arange(3), sign=1, step=True) == (7, 7, 7, 1.0)


def test_parts_are_named_once():
    assert set(CALLS) == set(PARTS) == set(EXPECTED) and check_parts(["lens", "swap"]) == (SWAP, "lens")
    with pytest.raises(Exception, match="part 'probe' is not known; of knockout, swap"):
        check_parts(["probe"])


def test_a_model_of_random_weights_makes_a_page_that_claims_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLM_MECH_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf")
    asked = ("--model", tmp_path / "tiny.gguf", "--data", "facts/opposites", "--n", "14", "--gates", "none")
    out = tmp_path / "out"
    assert command(experiment, *asked, "--all", "--parts", "swap", "lens", "tuned", "--out", out) == 0
    result = Result.load(out)
    assert not any(claim.made for claim in result.claims) and set(result.table["part"]) == {"swap", "lens", "tuned"}
    # The tuned lens is one: it reads other steps than the logit lens, but for the whole way from input to output.
    lenses = result.table[result.table["skipped"] == ""].pivot_table(index="layer", columns="part", values="change")
    assert not np.allclose(lenses["lens"], lenses["tuned"], atol=1e-4)
    assert any("Agreement needs at least two" in text for text in result.findings)
    assert (
        pd.read_csv(out / "reading.csv")["layer"].isna().all() and not pd.read_csv(out / "answers.csv")["right"].any()
    )
    assert {"reading", "curves"} == {path.stem for path in (out / "figures").glob("*.json")}
    assert command(experiment, *asked, "--out", tmp_path / "other") == 1
    assert "answers 0 of 123 questions of facts/opposites right, too few" in capsys.readouterr().err
    assert command(experiment, "--data", "scenes/colour", "--out", tmp_path / "third") == 2
    assert "'scenes/colour' are not facts" in capsys.readouterr().err


def test_figures_say_what_is_not_claimed():
    result, claims = page()
    found = study.readings(result, claims | {HEADS: ()}, n_layers=N_LAYERS)
    rows = [{name: None if pd.isna(value) else value for name, value in row.items()}
            for row in study.as_table(found).to_dict("records")]  # fmt: skip
    provenance = result.provenance | {"reading": rows, "agreed": list(study.agreed(found)), "n_layers": N_LAYERS}
    drawn = figures.drawn(dataclasses.replace(result, provenance=provenance, known={}))
    assert [each.text for each in drawn["reading"].layout.annotations].count("no claim") == 1
    assert len(drawn["curves"].data) == 2 * 3 + 1 + 1


@pytest.mark.real
def test_methods_agree_on_the_layer_of_smollm2_that_reads_capitals(tmp_path):
    out = tmp_path / "out"
    assert command(experiment, "--parts", KNOCKOUT, SWAP, HEADS, ATTRIBUTION, "--out", out) == 0
    result, table = Result.load(out), pd.read_csv(out / "reading.csv")
    assert result.provenance["agreed"] == [23] and result.table["group"].nunique() >= 20
    assert table["method"].tolist() == [KNOCKOUT, SWAP, SWAP, HEADS, ATTRIBUTION]
    assert (table["layer"] == 23).all() and (table["low"] >= 22).all() and (table["high"] <= 24).all()
    heads = table.set_index("method")["claimed heads"]
    assert "L23H4" in heads[HEADS] and "L23H4" in heads[ATTRIBUTION]
    assert all(not claim.lost for claim in result.claims if claim.made and claim.about["layer"] == 23)


@pytest.mark.real
def test_the_same_decoder_with_shuffled_weights_claims_nothing(tmp_path):
    out = tmp_path / "out"
    asked = ("--random-weights", "--n", "14", "--parts", KNOCKOUT, SWAP, HEADS)
    assert command(experiment, *asked, "--out", out) == 0
    result = Result.load(out)
    assert set(result.table["part"]) == {KNOCKOUT, SWAP, HEADS}
    assert [str(claim) for claim in result.claims if claim.made] == [] and result.provenance["agreed"] == []
    assert any("claims where the answer is read" in text for text in result.findings)
