"""The arbitration page: its rules by hand, what it says of planted arbiters, and the run of its command."""

import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from experiments import arbitration
from tests.helpers import assert_help_tells, command, killed_at
from vlm_mech.data.pairs import Pairs, load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.wording import BARE
from vlm_mech.methods.arbitration_page import claims, figures, protocols, study
from vlm_mech.methods.arbitration_page.crossover import LENS, Leads, spearman, token_sets, two_layer_rule
from vlm_mech.methods.arbitration_page.data import (
    CONFLICT,
    CROSSOVER,
    HEADS,
    PARTS,
    PATCHING,
    PRIOR_QUESTION,
    USUAL,
    Cases,
    Scan,
    cases_of,
    check_parts,
    conflicts_of,
    scan_of,
    spans_of,
)
from vlm_mech.methods.arbitration_page.disagreements import disagreements
from vlm_mech.methods.arbitration_page.parts import COLUMNS, How, said_of, told_by
from vlm_mech.methods.arbitration_page.patching import OTHERS, ZERO, outcomes_of
from vlm_mech.methods.arbitration_page.protocols import judged, lost_by, retained_by
from vlm_mech.methods.arbitration_page.study import Share, best_in, carried, outcomes, share_in
from vlm_mech.methods.gates.gated import Options
from vlm_mech.methods.layer_swap.controls import COUNTERFACTUAL, OTHER, SAME
from vlm_mech.models.vlm import VLM
from vlm_mech.organism.arbiter_draw import draw_arbiter
from vlm_mech.organism.arbiters import PlantedArbiter, arbiter_pairs, lost, plant_arbiter
from vlm_mech.results.claiming import claimed
from vlm_mech.results.result import Result
from vlm_mech.runs.workspace import Workspace

SEEDS = {"late head": 6005, "route": 6010, "blind": 6021, "none": 6005}
KINDS = ("late head", pytest.param("route", marks=pytest.mark.long), "blind", "none")
LOSE = KINDS[:3]
"""Draws with few layers; of the first two some objects are of conviction, of the others none and all."""
N = 24


@functools.cache
def planted(kind: str) -> PlantedArbiter:
    return plant_arbiter(draw_arbiter(SEEDS[kind], kind), check=False, n=16)


@functools.cache
def asked(kind: str) -> Cases:
    """Pairs whose questions are whole, so that the other one can be asked too."""
    pairs = arbiter_pairs(planted(kind).recipe, N, seed=1)
    each = tuple(
        dataclasses.replace(
            pair, question=f"{pair.question} here?", prior_question=f"{pair.question} usually?", wording=BARE
        )
        for pair in pairs
    )
    return cases_of(conflicts_of(dataclasses.replace(pairs, pairs=each)))


@functools.cache
def measured(kind: str) -> tuple[Result, float]:
    table, notes = study.rows_of(planted(kind).vlm, asked(kind), Scan(None), (CROSSOVER, PATCHING, HEADS))
    return study.result_of(table, {}), notes["furthest"]


@functools.cache
def said(kind: str) -> dict[str, protocols.Row]:
    return {row.key: row for row in protocols.protocols(measured(kind)[0], {})}


def of_lens_and_heads(kind: str) -> Result:
    """The same without patches."""
    result, _ = measured(kind)
    some = result.table["donor"].isin([LENS, ZERO, OTHERS])
    return dataclasses.replace(result, table=result.table[some].reset_index(drop=True), known={})


# By hand


def test_the_rule_of_two_layers_by_hand():
    lead = np.array([[9, -1, 1, 1, -1], [9, 1, -1, 1, -1], [0, 0, 0.5, 2, 2], [0, 2, 2, 2, -5.0]])
    np.testing.assert_array_equal(two_layer_rule(lead), [2, np.nan, 2, 1])
    np.testing.assert_array_equal(two_layer_rule(lead, margin=1.0), [np.nan, np.nan, 3, 1])


def test_rank_correlation_with_an_outcome_is_spearmans():
    values, won = np.array([0.5, 2, 2, -1, 7, 2, 0.5]), np.array([1, 1, 0, 0, 1, 0, 1], bool)
    assert spearman(values, won) == pytest.approx(spearmanr(values, won).statistic)


def test_flips_compare_two_answers_and_what_is_said_counts_all_words():
    # lead, says shown, says prior, first token
    before = np.array([[1, 1, 0, 5], [-1, 0, 1, 6], [-1, 0, 1, 6], [0, 0, 0, 9.0]])
    after = np.array([[-1, 0, 0, 9], [1, 1, 0, 5], [1, 0, 0, 9], [0, 0, 0, 9.0]])
    found = outcomes_of(before, after)
    np.testing.assert_array_equal(found["flip"], [1, 1, 1, 0])
    np.testing.assert_array_equal(found["restored"], [np.nan, 1, 0, 0])
    np.testing.assert_array_equal(found["taken"], [0, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(found["turned"], [1, 1, 1, 0])


def test_verdicts_need_examples():
    assert judged(Share(1.0, 0.3, 1.0, 3), "yes", "no", "none") == protocols.TOO_FEW
    assert judged(Share(0.5, 0.3, 0.7, 9), "yes", "no", "none") == "yes"
    assert judged(Share(0.4, 0.3, 0.7, 9), "yes", "no", "none") == "no"
    assert judged(study.NOTHING, "yes", "no", "none") == "none"


def rows(**columns: list[float]) -> Result:
    """A result of eight examples with one cell a layer, whose numbers are given by example and layer."""
    n = len(next(iter(columns.values())))
    table = []
    for layer in range(n):
        for example in range(8):
            row = {"example": f"{example}", "group": f"{example}", "run": CONFLICT, "donor": ZERO, "span": "last"}
            row |= {"layer": layer, "head": 0}
            for metric in study.METRICS:
                value = columns[metric.name][layer] if metric.name in columns else np.nan
                row |= {metric.name: float(example < value) if metric.name in columns else np.nan}
                row |= {f"{metric.name}_baseline": 0.0}
            table.append(row)
    return Result("by hand", pd.DataFrame(table), study.AXES, study.METRICS)


def test_a_layer_is_chosen_on_one_half_and_told_of_the_other():
    result = rows(restored=[0, 8, 2])
    found = best_in(result, "restored", run=CONFLICT, donor=ZERO)
    assert (found.layer, found.value, found.n) == (1, 1.0, 4)
    assert best_in(result, "restored", run=USUAL, donor=ZERO).n == 0
    assert share_in(result, "restored", layer=2).value == 0.25


def test_one_crossover_in_a_lot_is_not_never_above():
    """Seven pairs lost without a crossover, one with it: what is concluded must hold of both."""
    result = rows(lead=[0, 0, 0])
    lead = np.full((8, 4), -1.0)
    lead[0, 1:3] = 1
    table = [
        result.table[result.table["layer"] == 0].assign(
            donor=LENS, layer=layer - 1, lead=lead[:, layer], lead_baseline=0.0, distance=1.0
        )
        for layer in range(4)
    ]
    lens = pd.concat(table, ignore_index=True)
    both = pd.concat([lens, lens.assign(run=USUAL)], ignore_index=True)
    row = protocols.protocols(dataclasses.replace(result, table=both), {})[0]
    assert row.key == protocols.LENS and row.value == pytest.approx(1 / 8)
    assert row.concludes.startswith("in most pairs") and "never" not in row.concludes


def steered(**changed: float | list[float]) -> protocols.Row:
    facts = {"shown": [0.5, 0.3, 0.7, 20], "before": 0.1, "random_most": 0.2} | changed
    return protocols.protocols(of_lens_and_heads("none"), {"steering": facts})[-1]


def test_steering_needs_a_pair_that_is_lost():
    assert steered().concludes == protocols.STEERS
    assert steered(random_most=0.6).concludes == protocols.NO_STEER
    assert steered(before=1.0, random_most=1.0).concludes == protocols.NO_LOST
    assert steered(shown=[0.5, 0.1, 0.9, 2]).concludes == protocols.TOO_FEW


def test_a_direction_that_moves_logits_and_no_answers_is_told():
    facts = {"shown": [0.28, 0.1, 0.5, 25], "before": 0.08, "random_most": 0.32, "n_random": 20}
    slope = {"picture": "against", "slope": 0.85, "low": 0.17, "high": 1.6, "beaten_by": 1 / 21, "n": 25.0}
    for low, expected in ((0.17, True), (-0.17, False)):
        every = {"steering": facts | {"slopes": [slope | {"low": low}]}}
        result = of_lens_and_heads("none")
        texts = disagreements(protocols.protocols(result, every), result, every, 0.0)
        assert any("+0.85" in text and "p = 0.048" in text for text in texts) is expected


def test_the_horizon_asks_about_the_answer_that_is_given():
    vlm, pairs = planted("late head").vlm, asked("late head").pairs
    gone = lost(planted("late head").recipe, pairs).tolist()
    found, counts = said_of(vlm, asked("late head"), batch=8)
    assert counts == {"shown": gone.count(False), "prior": gone.count(True), "neither": 0}
    wanted = [pair.counterfactual_answer if each else pair.answer for pair, each in zip(pairs, gone, strict=True)]
    assert [pair.answer for pair in found] == wanted


def exchanged(**restored: list[float]) -> Result:
    """A result of eight pairs lost over two layers, with the share restored of last-token states by donor and layer."""
    own = rows(restored=[8, 8])
    some = []
    for donor, values in restored.items():
        table = rows(restored=values).table
        some.append(table.assign(donor={"usual": COUNTERFACTUAL, "same": SAME, "other": OTHER}[donor]))
    return dataclasses.replace(own, table=pd.concat(some, ignore_index=True))


@pytest.mark.parametrize(
    ("other", "concludes"), [([0, 0], protocols.BRINGS), ([8, 8], protocols.FOREIGN)], ids=["no other", "any state"]
)
def test_what_states_of_other_pairs_restore_is_told_beside_those_of_the_usual_picture(other, concludes):
    """Layer 1 is the last here, where a last token's state is the answer of its own run: it is not asked."""
    found = carried(exchanged(usual=[0, 0], same=[8, 0], other=other), "last")
    assert found is not None and (found.same.layer, found.same.value, found.usual.value) == (0, 1.0, 0.0)
    assert (found.than_usual.value, found.than_other.value) == (1.0, 1.0 - other[0] / 8)
    (row,) = protocols.carried_rows(exchanged(usual=[0, 0], same=[8, 0], other=other), "last", 0)
    assert row.concludes == concludes and "restored 1.00" in row.found
    (row,) = protocols.carried_rows(exchanged(usual=[0, 0], same=[0, 8], other=other), "last", 0)
    assert row.concludes == protocols.NO_MORE and row.value == 0
    assert carried(exchanged(usual=[0, 0]), "last") is None


def test_what_cannot_be_told_of_few_is_no_lack_of_pairs():
    few = rows(restored=[8])
    few = dataclasses.replace(few, table=few.table[few.table["example"].isin(["0", "1", "2"])])
    found = best_in(few, "restored", donor=ZERO)
    assert judged(found, "yes", "no", protocols.NO_LOST) == protocols.TOO_FEW and "too few" in str(found)
    none = best_in(few, "taken", donor=ZERO)
    assert judged(none, "yes", "no", protocols.NO_LOST) == protocols.NO_LOST and "no such pair" in str(none)


# Planted arbiters: docs/methods.md, "Arbiters"


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_of_a_layer_give_the_donors_run_and_count_the_pairs_won(kind):
    result, furthest = measured(kind)
    won = ~lost(planted(kind).recipe, asked(kind).pairs).numpy()
    assert outcomes(result).tolist() == won.tolist()
    assert furthest < 1e-3
    row = said(kind)[protocols.WHOLE]
    assert row.value == pytest.approx(won.mean()) and row.concludes == protocols.COUNTS
    every = result.table[(result.table["span"] == "all") & (result.table["donor"] == COUNTERFACTUAL)]
    assert (every["as_donor"] == 1).all()
    assert every.groupby(["run", "layer"])["flip"].mean().nunique() == 1


@pytest.mark.parametrize("kind", LOSE)
def test_exchanged_pictures_restore_nothing_in_pairs_lost(kind):
    found = said(kind)
    for span in ("image", "text", "last"):
        row = found[lost_by(span)]
        assert row.value == 0 and row.concludes == protocols.NOT_BACK, span
    texts = disagreements(tuple(found.values()), measured(kind)[0], {}, measured(kind)[1])
    assert any("usual image's states at all tokens can restore nothing" in text for text in texts)


def test_where_the_picture_wins_last_image_and_question_turn_every_answer():
    found = said("none")
    for span in ("image", "last"):
        assert found[retained_by(span)].value == 1 and found[retained_by(span)].concludes == protocols.CARRY
        assert found[lost_by(span)].concludes == protocols.NO_LOST
    assert found["usual question"].value == 1 and found["usual question"].concludes == protocols.DECIDES
    assert found[protocols.LENS].concludes == protocols.NO_LOST
    assert found[protocols.ZEROED].concludes == protocols.NO_LOST


@pytest.mark.parametrize("kind", LOSE[:2])
def test_a_head_set_to_zero_brings_back_what_an_exchange_does_not_in_every_kind(kind):
    found, (result, furthest) = said(kind), measured(kind)
    assert found[protocols.ZEROED].concludes == protocols.HEAD and found[protocols.ZEROED].value == 1
    texts = disagreements(tuple(found.values()), result, {}, furthest)
    assert any("Patching asks which states carry the answer" in text for text in texts)
    restoring = result.table[(result.table["donor"] == ZERO) & (result.table["restored"] == 1)]
    parts = {(part.layer, part.head) for part in planted(kind).truth.arbiter}
    assert parts <= set(zip(restoring["layer"], restoring["head"], strict=True))
    layer, head = sorted(parts)[0]
    own = (
        result.table[(result.table["donor"] == ZERO) & (result.table["layer"] == layer)].groupby("head")["lead"].mean()
    )
    others = result.table[(result.table["donor"] == OTHERS) & (result.table["layer"] == layer)]
    assert others[others["head"] == head]["lead"].mean() == pytest.approx(own.drop(head).mean())
    assert figures.drawn(dataclasses.replace(result, provenance={"curves": []})).keys() >= {"crossover", "heads_zeroed"}


def test_no_head_of_a_model_that_sees_nothing_restores_what_is_shown():
    assert said("blind")[protocols.ZEROED].concludes == protocols.NO_SINGLE
    result, _ = measured("blind")
    assert not [claim for claim in claimed(claims.pool(result), result) if claim.made]


def test_the_sign_of_nothing_meets_the_rule_of_two_layers_and_a_logit_does_not():
    """A model that cannot see, called overridden by the rule as it is published."""
    found, (result, furthest) = said("blind"), measured("blind")
    assert found[protocols.LENS].concludes == protocols.WRITTEN and found[protocols.LENS].value >= 0.5
    assert found[protocols.STRICT].concludes == protocols.NEVER and found[protocols.STRICT].value == 0
    texts = disagreements(tuple(found.values()), result, {}, furthest)
    assert any("the sign of their difference is chance" in text for text in texts)


def test_finder_and_lens_that_part_are_told_why():
    result, furthest = of_lens_and_heads("late head"), 0.0
    made = {"kind": "late head", "why": "", "n": {"lost": 9}, "restoring": 1, "restored": [1.0, 9], "lost": []}
    for kind, expected in (
        ("late head", "overridden in the next layer"),
        ("route", "must trigger an arbiter"),
    ):
        facts = {"arbiter": made | {"kind": kind}}
        every = protocols.protocols(result, facts)
        assert every[-1].concludes == f"the arbiter is of the kind {kind}"
        assert any(expected in text for text in disagreements(every, result, facts, furthest)), kind
    none = protocols.protocols(result, {"arbiter": made | {"kind": "none", "why": "the image wins"}})[-1]
    assert none.concludes == "no arbiter is claimed: the image wins"


def test_groups_with_few_random_ones_beside_them_are_no_test():
    result, furthest = of_lens_and_heads("none"), 0.0
    row = {"group": "promoting", "run": "first", "flip": 1.0, "flip_p": 0.25, "flip_draws": [0.0] * 3, "n": 9}
    facts = {"n": 18, "n_testing": 9, "asks_prior": True, "groups": {"promoting": [[3, 3]]}, "zeroed": [row]}
    every = protocols.protocols(result, {"heads": facts})
    assert every[-1].concludes == protocols.NO_TEST
    assert any("is the arbiter of lost pairs only if both are the same" in each for each in
               disagreements(every, result, {"heads": facts}, furthest))  # fmt: skip
    sure = protocols.protocols(result, {"heads": facts | {"zeroed": [row | {"flip_p": 0.01}]}})[-1]
    small = protocols.protocols(result, {"heads": facts | {"n_testing": 2}})[-1]
    assert (sure.concludes, small.concludes) == (protocols.HOLD, protocols.TOO_FEW)


# What is asked


def test_cases_turn_the_picture_in_conflict_first_and_know_both_questions():
    pairs = load_pairs("scenes/colour-conflict", n=2)
    faced = conflicts_of(pairs)
    assert [pair.answer for pair in faced] == [pair.counterfactual_answer for pair in pairs]
    assert [pair.prior for pair in faced] == [pair.answer for pair in pairs]
    assert cases_of(faced).prior_questions == () and "name no prior_question" in cases_of(faced).why_none
    given = cases_of(faced, "{question} usually?")
    assert given.prompts(PRIOR_QUESTION)[0].question == f"{faced[0].question} usually?"
    assert given[:1].prior_questions == given.prior_questions[:1]


def test_pairs_that_cannot_be_asked_are_refused_in_a_line():
    pairs = load_pairs("scenes/colour-conflict", n=2)
    other = tuple(dataclasses.replace(pair, prior=pair.counterfactual_answer) for pair in pairs)
    with pytest.raises(UsageError, match="they must be the same"):
        conflicts_of(dataclasses.replace(pairs, pairs=other))
    with pytest.raises(UsageError, match="conflict is not given"):
        conflicts_of(load_pairs("scenes/colour", n=2))
    with pytest.raises(UsageError, match="prior_question is empty"):
        cases_of(conflicts_of(pairs), " ")
    with pytest.raises(UsageError, match="part 'lens' is not known"):
        check_parts(("lens",))
    assert check_parts(()) == PARTS[:-1] and check_parts((HEADS, CROSSOVER)) == (CROSSOVER, HEADS)


def test_spans_part_the_prompt_and_words_of_both_answers_are_apart():
    vlm = VLM.load("organism", check=False)
    prompts = load_pairs("scenes/colour-conflict", n=2).base
    spans, row = spans_of(vlm, prompts), vlm.encode(prompts).rows[0]
    assert len(spans["text"].spans[0].numbers) + len(row.image) == len(row.present)
    (sets,) = token_sets(vlm, ["red"], ["green"])
    assert sets is not None and not set(sets[0]) & set(sets[1])
    assert token_sets(vlm, ["red"], ["red"]) == [None]


# The command


SMALL = ("--n", "4", "--batch", "2", "--gates", "none")


def test_a_run_leaves_its_tables_and_figures(tmp_path):
    assert command(arbitration, *SMALL, "--batch", "4", "--parts", "crossover", "patching", "--out", tmp_path) == 0
    kept = {path.name for path in tmp_path.iterdir()}
    assert {"result.parquet", "claims.json", "report.html", "protocols.csv", "crossover.csv", "outcome.csv"} < kept
    table = pd.read_csv(tmp_path / "protocols.csv")
    assert list(table.columns) == list(protocols.COLUMNS) and protocols.WHOLE in set(table["key"])
    result = Result.load(tmp_path)
    assert set(result.table["donor"]) >= {LENS, COUNTERFACTUAL, SAME}
    assert len(Leads.of(result.table).won) == 4
    page = (tmp_path / "report.html").read_text()
    table = page.index("<td>all tokens</td>")
    assert page.index("<h2>What each protocol would conclude") < table < page.index("<h2>All findings</h2>")
    assert page.count("<caption>protocols.csv</caption>") == 1 and page.count('<details class="section" open>') == 1
    saved = {path.stem for path in (tmp_path / "figures").glob("*.json")}
    assert saved == {"crossover", "patching", "patching_controls"}


def test_a_run_goes_on_after_a_kill(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(arbitration, *SMALL, "--parts", "crossover", "--out", whole) == 0
    with monkeypatch.context() as patch:
        killed_at(patch, Workspace, "keep", 2)
        assert command(arbitration, *SMALL, "--parts", "crossover", "--out", killed) == 130
    assert command(arbitration, *SMALL, "--parts", "crossover", "--out", killed, "--resume") == 0
    for name in ("result.parquet", "summary.csv", "protocols.csv"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def test_a_part_that_cannot_be_asked_says_why():
    few = cases_of(conflicts_of(load_pairs("scenes/colour-conflict", n=2)))
    found = told_by("steering", VLM.load("organism", check=False), few, How(Options("none", 0, 0, 2)))
    assert found.curves.empty and "too few for 3 parts" in found.why_not
    notes = found.kept()[1]
    assert (notes["part"], notes["claims"], notes["facts"]) == ("steering", [], {})


def test_controls_that_no_pair_has_are_told():
    pairs = conflicts_of(load_pairs("scenes/colour-conflict", n=2))
    scan = scan_of(VLM.load("organism", check=False), Pairs(pairs.name, pairs.pairs[:1]))
    assert scan.donors is None and "at least two are needed" in scan.why_none
    assert scan.names == (COUNTERFACTUAL,)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--parts", "lens"), "part 'lens' is not known"),
        (("--n-random", "0"), "n_random is 0"),
        (("--data", "scenes/colour"), "conflict is not given"),
        (("--measure", "logprob_diff"), "compares answers by logit_diff only"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(given, told, tmp_path, capsys):
    assert command(arbitration, "--n", "4", *given, "--out", tmp_path / "run") == 2
    assert told in capsys.readouterr().err


def test_lines_and_bars_are_drawn_from_what_the_parts_told():
    rows = [("steering", "shown", line, x, 0.5, 0.4, 0.6, 9.0) for line in ("direction", "random") for x in ("0", "1")]
    rows += [("heads", panel, "group", "promoting", 0.5, None, None, 9.0) for panel in ("first", "second")]
    curves = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    drawn = figures.drawn(dataclasses.replace(measured("none")[0], provenance={"curves": curves}))
    assert [list(trace.y) for trace in drawn["steering"].data if trace.fill is None] == [[0.5, 0.5]] * 2
    assert [trace.type for trace in drawn["heads"].data] == ["bar", "bar"]


def test_what_it_will_need_is_said_and_nothing_run(tmp_path, capsys):
    assert command(arbitration, *SMALL, "--dry-run", "--out", tmp_path / "run") == 0
    assert "forward" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_help_tells_its_options():
    assert_help_tells(arbitration, ("--parts", "--prior-question", "--n-random"))
