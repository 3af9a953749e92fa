"""Claims of commands on planted models: which are true, what layers they name, and what becomes of them at gates."""

import dataclasses

import pytest

from tests.validate.test_grading import MADE_UP, NOTHING, made
from vlm_mech.errors import UsageError
from vlm_mech.methods.attribution.claims import LOWERS, RAISES
from vlm_mech.methods.gates.gated import Options
from vlm_mech.methods.knockout.claims import HOLDS_BACK, NEEDED
from vlm_mech.methods.layer_swap.claims import MOVES, NO_LONGER, NOT_YET, TURNS, kind_of
from vlm_mech.methods.lens import claims as lens
from vlm_mech.methods.lens.study import GIVEN, OTHER_IMAGE
from vlm_mech.methods.probing.claims import CANNOT
from vlm_mech.methods.probing.claims import READS as CAN
from vlm_mech.methods.visual_flow import claims as flow
from vlm_mech.organism.planted import plant
from vlm_mech.organism.planted_draw import draw
from vlm_mech.organism.planted_recipe import Edge, Truth, Units
from vlm_mech.results import claim as claims
from vlm_mech.results.claim import Claim, Condition, Gate
from vlm_mech.validate import grading
from vlm_mech.validate.adapters import GATED, METHODS
from vlm_mech.validate.commands import layer_swap, turnings
from vlm_mech.validate.examination import Job, examine
from vlm_mech.validate.grading import MATCHED, SHARP, grade
from vlm_mech.validate.heads import EXCHANGED, ZEROED
from vlm_mech.validate.statements import Claims
from vlm_mech.validate.true_claims import holds, on_dormant_path

CONDITION, TOLD = Condition("logit_diff", {}, "below"), claims.Tested(16, -1.0, -1.5, -0.5, 0.001)


def claim(kind: str, *gates: tuple[str, bool | None], p: float = 0.001, **about: object) -> Claim:
    verdicts = tuple(Gate(name, verdict, "") for name, verdict in gates)
    return Claim(kind, about, "", (CONDITION,), declared=(TOLD,), tested=(TOLD,), p=p, gates=verdicts)


def swap(span: str, does: str, layer: int, *gates: tuple[str, bool | None], direction: str = "noising") -> Claim:
    return claim(kind_of(span, does), *gates, direction=direction, span=span, layer=layer)


def graded(*claims: Claim, truth: Truth = MADE_UP, kind: str = "hard", possible: tuple[Claim, ...] = ()) -> dict:
    found = grade(Claims(NOTHING, told=claims, possible=possible), truth, kind, n_layers=6, n_heads=4)
    return {name: (score.hits, score.n) for name, score in found.items()}


# What is true


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (claim(NEEDED, edge="question<-image", layer=2), True),
        (claim(NEEDED, edge="question<-image", layer=3), False),
        (claim(NEEDED, edge="last<-image", layer=3), False),
        (claim(HOLDS_BACK, edge="question<-image", layer=2), False),
        (claim(NEEDED, edge="last<-question", layer=4, head=0), True),
        (claim(NEEDED, edge="last<-question", layer=4, head=1), False),
        (claim(flow.READ, layer=1), True),
        (claim(flow.READ, layer=4), False),
        (claim(flow.WRITE, layer=4), True),
        (claim(flow.WRITE, layer=2), False),
        (claim(flow.CARRY, layer=4), True),
        (claim(flow.READ_NEEDED, layer=2, edge="question<-image"), True),
        (claim(flow.READ_NEEDED, layer=2, edge="last<-image"), False),
        (claim(flow.SUPPRESS, layer=4), False),
        (claim(flow.OVERTAKEN, layer=4), None),
        (claim(lens.RISE, layer=4, rival=OTHER_IMAGE), True),
        (claim(lens.RISE, layer=2, rival=OTHER_IMAGE), False),
        (claim(lens.PUSH, layer=4, rival=OTHER_IMAGE), False),
        (claim(lens.SUPPRESS, layer=2, rival=GIVEN), False),
        (claim(lens.AHEAD, layer=4, rival=OTHER_IMAGE), None),
        (claim(lens.OVERTAKEN, layer=4, rival=GIVEN), None),
        (claim(EXCHANGED, place="question", layer=2, head=1), True),
        (claim(EXCHANGED, place="last", layer=2, head=1), False),
        (claim(ZEROED, place="last", layer=4, head=0), True),
        (claim(ZEROED, place="last", layer=3, head=3), False),
        (claim(LOWERS, direction="noising", place="question", layer=1, head=0), True),
        (claim(RAISES, direction="noising", place="question", layer=1, head=0), False),
        (claim(RAISES, direction="denoising", place="question", layer=1, head=0), True),
        (claim(LOWERS, direction="denoising", place="question", layer=1, head=0), False),
        (claim(LOWERS, direction="noising", site="llm.mlp_out", span="last", layer=1), None),
        (claim(flow.TURNS, layer=0, span="image"), True),
        (claim(flow.TURNS, layer=1, span="image"), False),
    ],
)
def test_a_claim_is_true_where_it_is_planted(said, wanted):
    assert holds(said, MADE_UP) is wanted


def test_what_brings_a_prior_in_lowers_the_lead_over_it_alone():
    prior = Edge("suppress", "last", "question", 5, 1, 2.5)
    truth = dataclasses.replace(MADE_UP, edges=(*MADE_UP.edges, prior))
    for kind in (lens.PUSH, lens.SUPPRESS):
        assert holds(claim(kind, layer=5, rival=GIVEN), truth) is True
        assert holds(claim(kind, layer=5, rival=OTHER_IMAGE), truth) is None
    assert holds(claim(lens.RISE, layer=5, rival=GIVEN), truth) is None
    assert holds(claim(ZEROED, place="last", layer=5, head=1), truth) is None, "it goes either way, as answers fall"
    assert holds(claim(ZEROED, place="question", layer=5, head=1), truth) is False
    units = dataclasses.replace(MADE_UP, units=(Units("suppress", 3, (0,), 2.5),))
    assert holds(claim(lens.PUSH, layer=3, rival=GIVEN), units) is True


def test_answers_of_two_tokens_are_said_at_both():
    pieces = dataclasses.replace(MADE_UP, edges=(Edge("read", "last", "image", 2, 1, 1.0, ("answer",)),))
    for place, wanted in (("last+answer", True), ("last", True), ("question", False)):
        assert holds(claim(EXCHANGED, place=place, layer=2, head=1), pieces) is wanted


def reads(span: str, layer: int, does: str = CAN, point: str = "resid_post") -> Claim:
    return claim(f"linear probe, {span}, decoder: {does}", probe="linear", span=span, layer=layer, point=point)


def test_a_probe_can_read_what_is_planted_and_of_traces_nothing_is_known():
    """Carried to the last position at layer 4, copied nowhere."""
    assert holds(reads("image", 0, point="resid_pre"), MADE_UP) is holds(reads("image", 5), MADE_UP) is True
    assert holds(reads("image", 0, CANNOT), MADE_UP) is False
    assert [holds(reads("last", layer), MADE_UP) for layer in (0, 3, 4, 5)] == [None, None, True, True]
    assert [holds(reads("last", layer, CANNOT), MADE_UP) for layer in (3, 4)] == [None, False]
    copied = dataclasses.replace(MADE_UP, edges=(*MADE_UP.edges, Edge("copy", "last", "image", 2, 0, 0.0)))
    assert [holds(reads("last", layer), copied) for layer in (1, 2)] == [None, True]
    drowned = dataclasses.replace(MADE_UP, edges=(*MADE_UP.edges, Edge("suppress", "last", "question", 5, 0, 1.0)))
    assert [holds(reads("last", layer), drowned) for layer in (4, 5)] == [True, None]
    blind = dataclasses.replace(MADE_UP, edges=(Edge("read", "last", "image", 1, 0, 0.0),))
    assert holds(reads("last", 5), blind) is None


def test_a_swap_turns_the_answer_where_more_than_half_of_it_passes():
    """Read at layer 1 (.6) and 2 (.4), carried at layer 4; states are those after a layer."""
    truths = {
        ("image", TURNS): (0,), ("image", NO_LONGER): (1, 2, 3, 4), ("question", TURNS): (1, 2, 3),
        ("question", MOVES): (1, 2, 3), ("last", TURNS): (4,), ("last", NOT_YET): (0, 1, 2, 3),
    }  # fmt: skip
    for (span, does), layers in truths.items():
        assert tuple(n for n in range(5) if holds(swap(span, does, n), MADE_UP)) == layers, (span, does)
    read = Edge("read", "last", "image", 1, 0, 0.48)
    near = dataclasses.replace(MADE_UP, edges=(read, dataclasses.replace(read, layer=2, weight=0.52)))
    assert holds(swap("image", TURNS, 1), near) is None, "too near to a half"
    blind = dataclasses.replace(MADE_UP, edges=(dataclasses.replace(read, weight=0.0),))
    assert holds(swap("image", NO_LONGER, 1), blind) is False, "it never did"


def test_layers_lie_between_claims_of_both_kinds():
    kinds = (TURNS, NO_LONGER)
    both = [swap("image", TURNS, 0), swap("image", TURNS, 1), swap("image", NO_LONGER, 3), swap("image", NO_LONGER, 4)]
    assert turnings(both, "image", kinds, 5) == (2, 3)
    assert turnings(both[:2], "image", kinds, 5) == (2, 3, 4, 5), "above what turns it, up to the last attention"
    assert turnings(both[2:], "image", kinds, 5) == (0, 1, 2, 3)
    assert turnings([], "image", kinds, 5) == turnings(both, "last", (NOT_YET, TURNS), 5) == ()
    other = swap("image", NO_LONGER, 1, direction="denoising")
    assert turnings([*both, other], "image", kinds, 5) == (0, 1, 2, 3), "what any direction says counts"


# Grades


def test_claims_and_gates_are_counted():
    true = claim(NEEDED, ("stability", True), ("random twin", False), edge="question<-image", layer=2)
    false = claim(NEEDED, ("stability", False), ("natural states", None), edge="last<-image", layer=2)
    unheld = claim(NEEDED, ("stability", False), p=0.2, edge="last<-image", layer=5)
    unknown = claim(flow.OVERTAKEN, ("stability", False), layer=1)
    possible = (true, false, unheld, claim(NEEDED, edge="question<-image", layer=1))
    assert graded(true, false, unheld, unknown, possible=possible) == {
        grading.FALSE_RUN: (1, 1), grading.FALSE_CLAIMS: (1, 2), grading.POWER: (1, 2),
        grading.LOST_FALSE["stability"]: (1, 1), grading.LOST_TRUE["stability"]: (0, 1),
        grading.LOST_TRUE["random twin"]: (1, 1),
    }  # fmt: skip
    assert graded(true)[grading.FALSE_RUN] == graded()[grading.FALSE_RUN] == (0, 1)
    assert set(grading.LOST_FALSE) == set(grading.LOST_TRUE) == {
        "stability", "random twin", "shuffled answers", "natural states", "other removals"
    }  # fmt: skip


def test_any_false_claim_counts_in_a_null():
    truth = dataclasses.replace(MADE_UP, edges=(Edge("read", "last", "image", 1, 0, 0.0),))
    for kind in (MATCHED, SHARP):
        for said in (claim(HOLDS_BACK, edge="last<-image", layer=1), swap("image", MOVES, 1), swap("last", NOT_YET, 1)):
            assert graded(said, truth=truth, kind=kind)[grading.CLAIMS] == (1, 1)
            assert graded(dataclasses.replace(said, p=0.5), truth=truth, kind=kind)[grading.CLAIMS] == (0, 1)


@pytest.mark.parametrize("method", [*GATED, "head interchange", "zero ablation"])
def test_claims_of_commands_are_those_that_are_graded(method):
    found = METHODS[method](made("two-hop"), made("two-hop").pairs(32, seed=1))
    assert found.told and {*map(repr, ((each.kind, each.about) for each in found.told))} <= {
        *map(repr, ((each.kind, each.about) for each in found.possible))
    }
    truth = made("two-hop").truth
    assert not [str(each) for each in grading.made(found) if holds(each, truth) is False]
    scores = grade(found, truth, "plain", n_layers=6, n_heads=4)
    assert scores[grading.FALSE_RUN].value == 0 and scores[grading.POWER].value > 0.8


# Dormant paths


def test_a_claim_rests_on_a_dormant_path_only_where_one_is_planted():
    direct = dataclasses.replace(MADE_UP, edges=(Edge("read", "last", "image", 3, 1, 1.0),))
    dormant = dataclasses.replace(direct, units=(Units("dormant", 4, (0,), 1.5),))
    for layer, wanted in ((2, False), (3, True)):
        assert on_dormant_path(swap("image", TURNS, layer), dormant) is wanted
        assert not on_dormant_path(swap("image", TURNS, layer), direct)
    assert not on_dormant_path(swap("last", NOT_YET, 3), dormant) and holds(swap("last", NOT_YET, 3), dormant) is False
    some = [swap("image", TURNS, layer, ("natural states", False)) for layer in (3, 4)]
    untried = swap("image", TURNS, 3, ("natural states", None), direction="denoising")
    assert graded(*some, untried, truth=dormant)[grading.DORMANT] == (1, 1)
    passed = swap("image", TURNS, 4, ("natural states", True))
    assert graded(*some, passed, truth=dormant)[grading.DORMANT] == (0, 1)
    for each in (graded(untried, truth=dormant), graded(*some, truth=direct)):
        assert grading.DORMANT not in each


@pytest.mark.parametrize(
    "seed", [30000, pytest.param(30001, marks=pytest.mark.long), pytest.param(30002, marks=pytest.mark.long)]
)
def test_natural_states_flag_dormant_paths_and_nothing_true(seed):
    planted = plant(draw(seed, "dormant path"), check=False, n=16)
    found = layer_swap(planted, planted.pairs(32, seed=1), asked=Options("all", 0, 0, 32))
    sizes = {"n_layers": planted.vlm.n_layers("llm"), "n_heads": planted.vlm.n_heads("llm")}
    scores = grade(found, planted.truth, "dormant path", **sizes)
    assert scores[grading.DORMANT].value == 1
    assert scores[grading.LOST_TRUE["natural states"]].value == 0 and scores[grading.LOST_TRUE["natural states"]].n > 2


def test_gates_are_asked_of_methods_that_make_claims_only():
    job = Job("plain", 0, ("knockout", "head interchange"), n_examples=24, n_population=8, gates="all", null=1)
    table, _ = examine(job)
    names = {name for name in table["grade"] if " rejected by " in name}
    assert names and set(table.loc[table["grade"].isin(names), "method"].tolist()) == {"knockout"}
    assert {name.partition(" rejected by ")[2] for name in names} >= {"stability", "random twin", "shuffled answers"}
    with pytest.raises(UsageError, match="null is -1"):
        Job("plain", 0, null=-1)
