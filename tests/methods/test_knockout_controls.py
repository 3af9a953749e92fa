"""Controls of equal attention mass and of equal distance, with sinks and without, against plain sums and counts."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import knockout as experiment
from tests.helpers import command
from tests.zoo import ZOO
from tests.zoo.tiny import picture
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import UsageError
from vlm_mech.extraction import sink_rule
from vlm_mech.interventions.attention_weights import attention_rows
from vlm_mech.methods.knockout import controls
from vlm_mech.methods.knockout.claims import pool
from vlm_mech.methods.knockout.controls import (
    NO_EDGES,
    NO_MASS,
    control_of_distance,
    control_of_mass,
    free_edges,
    sinks_of,
)
from vlm_mech.methods.knockout.data import (
    CONTROL,
    DISTANCE,
    EDGE,
    MASS,
    MATCHED,
    SPARED,
    Found,
    Scan,
    cuts_of,
    ending_of,
    found_edges,
    kind_of_control,
    sweeps,
)
from vlm_mech.methods.knockout.edges import Ends, control_of, parse_edge
from vlm_mech.methods.knockout.findings import weighed
from vlm_mech.methods.knockout.layers import layer_sets
from vlm_mech.methods.knockout.study import METRICS, knock_out, plan_knockout
from vlm_mech.models.vlm import VLM
from vlm_mech.results.claiming import claimed
from vlm_mech.results.result import Result
from vlm_mech.sweeps.measures import said
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.recorded_pass import record

EVERY = ("size", "mass", "distance")
QUESTIONS = ("what colour is the circle?", "is the red star left of the blue circle?")


@pytest.fixture(scope="module")
def pairs():
    made = [
        Pair(str(number), picture(number), picture(100 + number), QUESTIONS[number % 2], "red star", "blue star")
        for number in range(4)
    ]
    return Pairs("pictures", tuple(made))


def scan(*names, size=None, heads=None, sinks="include", kinds=EVERY, n_layers=4):
    edges = tuple(parse_edge(name) for name in names)
    return Scan(edges, layer_sets(n_layers, "each", size), heads, cuts_of(kinds, sinks=sinks))


def found_in(vlm, pairs, wanted, seed=0):
    return found_edges(vlm, pairs, wanted, {}, only_correct=False, seed=seed)


def edges_cut(here, kind, visible, n_answer=0):
    """The edges of a part one by one, as the knockout cuts them."""
    cut = set()
    for part in here.parts:
        queries = [*part.query, *(range(len(visible), len(visible) + n_answer) if part.answer else ())]
        for query in queries:
            for key in part.key:
                if (kind[1] == EDGE or query != key) and (query >= len(visible) or visible[query, key]):
                    cut.add((query, key))
    return cut


def eager_attention(vlm, pair):
    """Hugging Face's own weights of one example with its answer after it: layer, head, query, key; no padding."""
    encoded = readings_of(vlm, vlm.encode(pair.base), [said(pair.answer)]).encoded
    with torch.no_grad():
        return torch.stack(vlm.model(**encoded.inputs, output_attentions=True).attentions)[:, 0].double().numpy()


# The masses


@pytest.mark.parametrize("heads", [None, (0, 3)])
def test_the_mass_reached_is_that_of_the_edge_by_hugging_faces_own_weights(tiny_vlm, pairs, heads):
    vlm, eager = tiny_vlm(), tiny_vlm(attn="eager")
    names = ("last+answer<-image",) if heads else ("last<-image", "question<-image", "last+answer<-image")
    wanted = scan(*names, size=None if heads else 2, heads=heads)
    found, ratios = found_in(vlm, pairs, wanted), []
    clean = record(vlm, vlm.encode(pairs.base))
    for number in range(len(pairs)):
        weights = eager_attention(eager, pairs[number : number + 1])
        n_tokens = len(clean.encoded.rows[number].present)
        visible, n_answer = np.tri(n_tokens, dtype=bool), weights.shape[-1] - n_tokens
        assert n_answer == 1
        for edge in names:
            for place in wanted.places:
                total = weights[list(wanted.layers.sets[place[0]])].sum(0)
                total = total.sum(0) if heads is None else total[place[1]]
                masses = {}
                for kind in wanted.kinds(parse_edge(edge)):
                    if kind[2:] not in ((), place):
                        continue
                    here = found[kind][number]
                    if not isinstance(here, Found):
                        # The prompt has too few other edges.
                        assert kind[1] in (CONTROL, DISTANCE) and edge == "question<-image"
                        continue
                    cut = edges_cut(here, kind, visible, n_answer)
                    masses[kind[1]] = sum(total[query, key] for query, key in cut)
                    assert here.mass[place] == pytest.approx(masses[kind[1]], abs=1e-5)
                    if kind[1] != EDGE:
                        own = edges_cut(found[edge, EDGE][number], (edge, EDGE), visible, n_answer)
                        assert not cut & own and not any(query == key for query, key in cut)
                ratios.append([masses.get(name, np.nan) / masses[EDGE] for name in (CONTROL, MASS, DISTANCE)])
    size, mass, distance = np.abs(np.array(ratios) - 1).T
    assert mass.max() < 0.03 and np.median(mass) <= controls.CLOSE
    assert np.nanmax(size) > 0.1 and np.nanmax(distance) > 0.1, "what is equal in number is not in attention"


def test_rows_of_attention_are_hugging_faces(tiny_vlm, pairs):
    vlm = tiny_vlm()
    encoded = vlm.encode(pairs.base)
    eager = tiny_vlm(attn="eager")
    with torch.no_grad():
        expected = eager.model(**eager.encode(pairs.base).inputs, output_attentions=True).attentions
    queries = [list(row.present)[-3:] for row in encoded.rows]
    by_head, summed = (attention_rows(vlm, encoded, queries, [2], by_head=each)[2] for each in (True, False))
    for example, positions in enumerate(queries):
        rows = expected[2][example][:, positions]
        assert (by_head[example] - rows).abs().max() < 1e-5
        assert (summed[example] - rows.sum(0)).abs().max() < 1e-5
    with pytest.raises(UsageError, match="queries of 1 examples given"):
        attention_rows(vlm, encoded, queries[:1], [2])


def test_a_control_that_cannot_have_the_mass_has_all_there_is():
    visible, ends = np.tri(4, dtype=bool), Ends((3,), (1, 2))
    free = free_edges(ends, visible, (0,))
    assert sorted(map(tuple, np.argwhere(free).tolist())) == [(2, 1)]
    attended = np.where(visible, 0.25, 0.0)
    random = np.random.default_rng(0)
    assert control_of_mass(ends, free, attended, 0.5, random) == (Ends((2,), (1,)),)
    assert control_of_mass(ends, free & False, attended, 0.5, random) == NO_EDGES
    assert control_of_mass(ends, free, attended, 0.0, random) == NO_MASS
    # A single edge that goes beyond what is wanted is taken where it comes nearer than nothing does.
    assert control_of_mass(ends, free, attended, 0.2, random) == (Ends((2,), (1,)),)
    assert control_of_mass(ends, free, attended, 0.1, random) == NO_EDGES


def test_mass_is_taken_from_as_many_queries_as_the_edge_has_while_these_have_it():
    visible, drawn = np.tri(40, dtype=bool), set()
    attended = visible / visible.sum(1, keepdims=True)
    ends = Ends((38, 39), tuple(range(5, 15)))
    wanted = attended[np.ix_(ends.query, ends.key)].sum()
    for seed in range(30):
        parts = control_of_mass(ends, free_edges(ends, visible, ()), attended, wanted, np.random.default_rng(seed))
        assert not isinstance(parts, str)
        cut = {(query, key) for part in parts for query in part.query for key in part.key}
        assert sum(attended[edge] for edge in cut) == pytest.approx(wanted, rel=0.05)
        drawn.add((len({query for query, _ in cut}), parts))
    assert len(drawn) == 30 and np.median([n_queries for n_queries, _ in drawn]) <= 3


def test_weights_are_taken_in_order_and_passed_by_where_they_would_be_too_much():
    random = np.random.default_rng(0)
    for _ in range(200):
        weights, limit = random.random(random.integers(0, 12)), 3 * random.random()
        expected, left = [], limit
        for number, weight in enumerate(weights):
            if weight <= left:
                expected.append(number)
                left -= weight
        assert controls._below(weights, limit).tolist() == expected


# The distances


def test_distances_are_those_of_the_edge_where_other_edges_have_them():
    visible = np.tri(20, dtype=bool)
    ends = Ends((12, 15), (3, 4, 7))
    for seed in range(20):
        parts = control_of_distance(ends, free_edges(ends, visible, (0,)), visible, np.random.default_rng(seed))
        assert not isinstance(parts, str)
        cut = [(query, key) for part in parts for query in part.query for key in part.key]
        assert sorted(query - key for query, key in cut) == [5, 8, 8, 9, 11, 12]
        assert all(key != 0 and not (query in ends.query and key in ends.key) for query, key in cut)
    # No other edge is 11 apart; 10 apart is one, and the next nearest is 9 apart.
    far, visible = Ends((11,), (0,)), np.tri(12, dtype=bool)
    answer = dataclasses.replace(far, answer=True)
    (part,) = control_of_distance(far, free_edges(far, visible, ()), visible, np.random.default_rng(0))
    assert part.query[0] - part.key[0] == 10
    parts = control_of_distance(answer, free_edges(far, visible, ()), visible, np.random.default_rng(0), n_answer=2)
    distances = [query - key for part in parts for query in part.query for key in part.key]
    assert sorted(distances) == [9, 10, 10]
    everything = Ends(tuple(range(12)), tuple(range(12)))
    free = free_edges(everything, visible, ())
    assert control_of_distance(everything, free, visible, np.random.default_rng(0)) == NO_EDGES


# What controls do not depend on, and sinks


def test_controls_depend_on_the_seed_and_not_on_the_batch(vlm, pairs):
    wanted = scan("last<-image", "last+answer<-question", size=2, sinks="exclude")
    found, other = found_in(vlm, pairs, wanted), found_in(vlm, pairs, wanted, seed=1)
    alone = [found_in(vlm, pairs[number : number + 1], wanted) for number in range(4)]
    for kind, rows in found.items():
        for number, here in enumerate(rows):
            assert here == alone[number][kind][0]
        assert (rows == other[kind]) == (kind[1] == EDGE)
    table, _ = knock_out(vlm, pairs, wanted, only_correct=False)
    single = pd.concat(knock_out(vlm, pairs[n : n + 1], wanted, only_correct=False)[0] for n in range(4))
    keys = ["example", *wanted.axes]
    one, two = table.set_index(keys).sort_index(), single.set_index(keys).sort_index()
    assert np.array_equal(one["mass"], two["mass"]) and one["mass"].notna().all()
    assert np.allclose(one["logit_diff"], two["logit_diff"], atol=2e-5)


@pytest.mark.parametrize("sinks", ["include", "exclude"])
def test_no_control_cuts_a_token_off_itself(vlm, pairs, sinks):
    wanted = scan("last<-image", sinks=sinks)
    found = found_in(vlm, pairs, wanted)
    ((chosen, points, cut),) = sweeps(pairs, wanted.points(), found, wanted)
    assert len(chosen) == 4 and len(points) == 16
    for point in points:
        assert {part.keep_self for part in cut(point).flat()} == {point.cut != EDGE}


def test_the_table_is_that_of_the_reference(vlm, pairs):
    wanted = scan("last<-image", kinds=("mass", "distance"))
    table, _ = knock_out(vlm, pairs, wanted, only_correct=False)
    reference, _ = knock_out(vlm, pairs, wanted, only_correct=False, engine="trace")
    assert np.allclose(table["logit_diff"], reference["logit_diff"], atol=2e-5)
    assert (table.groupby("cut")["mass_ratio"].mean()[[EDGE, MASS]] - 1).abs().max() < 0.01
    default, _ = knock_out(vlm, pairs, scan("last<-image", kinds=("size",)), only_correct=False)
    assert {"mass", "mass_ratio"} & set(default.columns) == set()
    assert np.array_equal(default[default["cut"] == EDGE]["logit_diff"], table[table["cut"] == EDGE]["logit_diff"])


@pytest.mark.parametrize("lenient", [False, True])
def test_sinks_that_are_spared_are_never_cut(vlm, pairs, monkeypatch, lenient):
    if lenient:
        monkeypatch.setattr(sink_rule, "SHARE", 0.02)
        monkeypatch.setattr(sink_rule, "OUTLIER", 1.0)
    wanted = scan("last<-question", "last+answer<-question", sinks="exclude")
    found = found_in(vlm, pairs, wanted)
    free = found_in(vlm, pairs, scan("last<-question", "last+answer<-question"))
    keys = {kind_of_control(kind[1]): set() for kind in free}
    for kind, rows in free.items():
        keys[kind_of_control(kind[1])] |= {key for here in rows for part in here.parts for key in part.key}
    assert all(0 in keys[name] for name in (CONTROL, MASS, DISTANCE)), "the first token is cut where it may be"
    numbers = []
    for number in range(len(pairs)):
        encoded = readings_of(vlm, vlm.encode(pairs[number : number + 1].base), [said(("red star",))]).encoded
        sinks = sinks_of(record(vlm, encoded))
        with torch.no_grad():
            states = vlm.model(**encoded.inputs, output_hidden_states=True).hidden_states
        n_tokens = len(encoded.rows[0].present)
        every = torch.stack([states[layer][0, :n_tokens] for layer in (2, 3)])
        normed = (every / every.pow(2).mean(-1, keepdim=True).sqrt()).abs().numpy()
        width, share, outlier = every.shape[-1], sink_rule.SHARE, sink_rule.OUTLIER
        means = normed[:, 0].mean(0)
        dims = [dim for dim in np.argsort(-means)[:2] if means[dim] ** 2 > share * width]
        expected = {0}
        for layer in normed[:, :, dims].max(-1) if dims else ():
            least = max((share * width) ** 0.5, outlier * np.median(layer))
            if layer[0] > least:
                expected |= {
                    token for token in range(n_tokens) if layer[token] > least and 2 * layer[token] >= layer[0]
                }
        assert sinks == expected
        numbers.append(len(sinks))
        for kind, rows in found.items():
            cut = {key for part in getattr(rows[number], "parts", ()) for key in part.key}
            assert kind[1] == EDGE or not cut & sinks
    assert (max(numbers) > 1) == lenient
    assert {kind[1] for kind in found} == {EDGE, *(name + SPARED for name in (CONTROL, MASS, DISTANCE))}


def test_controls_cut_as_many_sinks_as_their_edge():
    visible, sinks = np.tri(30, dtype=bool), (0, 4, 9, 20)
    for key in ((3, 4, 5, 9), (3, 5), (0, 4, 9, 20)):
        ends = Ends((28, 29), key)
        for seed in range(20):
            found = control_of(ends, visible, np.random.default_rng(seed), sinks=sinks)
            assert not isinstance(found, str)
            cut = [token for part in found[:1] for token in part.key]
            assert len(set(cut) & set(sinks)) == len(set(key) & set(sinks)) and len(cut) <= len(key)
            edges = sum(int(visible[query, each]) for part in found for query in part.query for each in part.key)
            own = sum(query == each for part in found for query in part.query for each in part.key)
            assert edges - own == 2 * len(key)
    with pytest.raises(UsageError, match="sinks are matched by equal size alone"):
        cuts_of(["mass"], sinks="match")
    assert cuts_of(["size"], sinks="match") == (EDGE, CONTROL + MATCHED)
    assert kind_of_control(CONTROL + MATCHED) == CONTROL and ending_of(CONTROL + MATCHED) == MATCHED


def test_a_run_may_match_sinks(vlm, pairs):
    table, _ = knock_out(vlm, pairs, scan("last<-question", kinds=("size",), sinks="match"), only_correct=False)
    assert set(table["cut"]) == {EDGE, CONTROL + MATCHED} and table["logit_diff"].notna().all()


def test_controls_are_drawn_where_masks_are_not_plainly_causal(pairs):
    """Of windows that see near tokens only, and of prompts that see all of themselves."""
    pairs = Pairs("pictures", tuple(dataclasses.replace(pair, answer="red") for pair in pairs))
    for family in ("gemma3", "paligemma"):
        vlm = VLM(*ZOO[family]("sdpa", 0), name=family, check=False)
        wanted = scan("last<-image", "last<-question", n_layers=vlm.n_layers("llm"), sinks="exclude")
        table, _ = knock_out(vlm, pairs, wanted, only_correct=False)
        held = table[(table["cut"] == MASS + SPARED) & (table["skipped"] == "")]
        assert held["mass_ratio"].between(0.9, 1.1).mean() > 0.9 and held["logit_diff"].notna().all()
        blind = table[(table["cut"] == MASS + SPARED) & (table["skipped"] == NO_MASS)]
        assert set(blind["layer"]) == ({0, 2} if family == "gemma3" else set())


# What is said of them


def synthetic(effects):
    """A result of 20 examples with these changes of the answers' difference by cut."""
    noise, rows = np.random.default_rng(0).normal(0, 0.1, (20, len(effects))), []
    for example in range(20):
        for number, (cut, effect) in enumerate(effects.items()):
            row = {"example": str(example), "edge": "last<-image", "cut": cut, "layer": 1, "skipped": ""}
            rows.append(row | {"logit_diff": 10 + effect + noise[example, number], "logit_diff_baseline": 10.0})
    table = pd.DataFrame(rows)
    for name in [metric.name for metric in METRICS if metric.name not in table]:
        table[name] = table[f"{name}_baseline"] = 0.0
    return Result("knockout", table, ("edge", "cut", "layer"), METRICS)


@pytest.mark.parametrize("strong", [None, CONTROL, MASS + SPARED, DISTANCE])
def test_a_claim_must_beat_every_control_that_there_is(strong):
    effects = {EDGE: -4.0} | {cut: -4.0 if cut == strong else 0.0 for cut in (CONTROL, MASS + SPARED, DISTANCE)}
    result = synthetic(effects)
    made = [claim for claim in claimed(pool(result), result) if claim.made]
    assert len(made) == (strong is None)
    assert {len(claim.conditions) for claim in pool(result)} == {4}
    for claim in made:
        told = str(claim)
        assert claim.strength(claim.tested) == pytest.approx(4, abs=0.3)
        assert "minus the effect of the same number of random edges: -" in told
        assert "minus the effect of random edges of equal attention mass, sinks spared: -" in told
        assert "minus the effect of random edges of equal distance: -" in told


def test_how_much_attention_controls_have_is_said():
    result = synthetic({EDGE: -4.0, CONTROL: 0.0, MASS: 0.0})
    assert weighed(result) == ()
    ratio = result.table["cut"].map({EDGE: 1.0, CONTROL: 2.5, MASS: 0.4})
    (sentence, lacking) = weighed(dataclasses.replace(result, table=result.table.assign(mass=1.0, mass_ratio=ratio)))
    assert "control of equal size 2.50 to 2.50, control of equal mass 0.40 to 0.40" in sentence
    assert lacking.startswith("The control of equal mass of last<-image reaches less than 95 % in 1 of 1 cell(s)")


# The command


def test_a_run_and_its_plan_know_their_controls(tmp_path, capsys):
    out, more = tmp_path / "run", ["--n", "6", "--layers", "groups:2", "--edges", "last<-image", "--gates", "none"]
    more += ["--control", "mass", "distance", "--sinks", "exclude"]
    assert command(experiment, *more, "--dry-run", "--out", tmp_path / "plan") == 0
    assert "6 cells" in capsys.readouterr().out
    assert command(experiment, *more, "--out", out) == 0
    result = Result.load(out)
    assert set(result.table["cut"]) == {EDGE, MASS + SPARED, DISTANCE + SPARED}
    page = (out / "report.html").read_text()
    assert "control of equal mass, sinks spared 0.99 to 1.00" in page or "sinks spared 1.00 to 1.00" in page
    assert command(experiment, *more[:2], "--control", "weight", "--out", tmp_path / "wrong") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--control" in error


def test_plans_have_the_cells_of_all_controls(vlm, pairs):
    plans = [plan_knockout(vlm, pairs, scan("last<-image", kinds=kinds)) for kinds in (("size",), EVERY)]
    assert [plan.n_cells for plan in plans] == [8, 16] and plans[1].flops > 1.5 * plans[0].flops
    with pytest.raises(UsageError, match="control 'weight' is not known; use one of size, mass, distance"):
        cuts_of(["weight"])
