"""Public calls given the wrong thing end in one line that says what was given and what would be right."""

import numpy as np
import pytest
import torch

from tests.zoo.tiny import picture
from vlm_mech import (
    VLM,
    Direction,
    DualEncoder,
    Each,
    HeadInput,
    LensTraining,
    Measure,
    Metric,
    Pair,
    Pairs,
    Prompt,
    Replace,
    Site,
    TunedLens,
    UsageError,
    WorkError,
    attribute,
    compare_lenses,
    context_words,
    dose_response,
    explore,
    extract,
    find_arbiter,
    find_direction,
    find_sinks,
    frozen,
    generate,
    grid,
    head_roles,
    horizon,
    identifiability,
    layer_swap,
    lens,
    lens_lead,
    load_pairs,
    logit_diff,
    matched_tokens,
    named_patches,
    path_patching,
    plan_sweep,
    prob,
    probe,
    read,
    run,
    sites,
    sweep,
    train_das,
    train_tuned_lens,
    weights_folder,
)

pytestmark = pytest.mark.usefixtures("untyped")

LAST = Site("llm.resid_post", 0)


@pytest.fixture(scope="module")
def organism():
    return VLM.load("organism", check=False)


@pytest.fixture(scope="module")
def clip():
    return DualEncoder.load("clip", check=False)


@pytest.fixture(scope="module")
def pairs():
    return load_pairs("scenes/colour", n=2)


def refused(call):
    """The message of a call, which is one line."""
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300, message
    return message


# Sites

TAKE_SITES = {
    "read": lambda vlm, prompts, sites, _: read(vlm, prompts, sites),
    "lens": lambda vlm, prompts, sites, _: lens(vlm, prompts, sites, "last"),
    "extract": lambda vlm, prompts, sites, folder: extract(vlm, prompts, sites, spans="last", folder=folder),
    "train_tuned_lens": lambda vlm, prompts, sites, _: train_tuned_lens(
        vlm, prompts[:1], prompts[1:], sites, "last", training=LensTraining(n_steps=1)
    ),
}


@pytest.mark.parametrize("name", TAKE_SITES)
def test_a_single_site_is_one_site(name, organism, pairs, tmp_path):
    found = TAKE_SITES[name](organism, pairs.base, LAST, tmp_path)
    many = TAKE_SITES[name](organism, pairs.base, [LAST], tmp_path / "many")
    for each in (found, many):
        assert [str(site) for site in (each.values if name == "read" else each.sites)] == ["llm.resid_post[0]"]


@pytest.mark.parametrize("name", TAKE_SITES)
@pytest.mark.parametrize("given", ["llm.resid_post", ["llm.resid_post"], 3, None])
def test_a_name_is_no_site(name, given, organism, pairs, tmp_path):
    message = refused(lambda: TAKE_SITES[name](organism, pairs.base, given, tmp_path))
    what = given[0] if isinstance(given, list) else given
    assert message.endswith(f" is given {what!r} as a site; a Site is needed: Site('llm.resid_post', 3)")
    assert message.startswith(name)


def test_a_single_site_and_span_are_one_cell_of_an_attribution(organism, pairs):
    measure = logit_diff(pairs.answer, pairs.counterfactual_answer)
    one = attribute(organism, pairs, LAST, "last", measure, directions="noising", top_k=1, n_random=1)
    several = attribute(organism, pairs, [LAST], ["last"], measure, directions=["noising"], top_k=1, n_random=1)
    assert one.screen.table.equals(several.screen.table) and set(one.screen.table["direction"]) == {"noising"}
    assert "Site('llm.resid_post', 3)" in refused(lambda: attribute(organism, pairs, "llm.resid_post", "last", measure))


def test_what_would_be_right_fits_sites_without_layers():
    message = refused(lambda: Replace("projector.out", "image", source=[]))
    assert "Site('projector.out')" in message


def test_layers_are_whole_numbers():
    assert sites("llm.resid_post", 3) == (Site("llm.resid_post", 3),)
    assert "layer '1' of site 'llm.resid_post'; a whole number" in refused(lambda: Site("llm.resid_post", "1"))
    assert "whole number" in refused(lambda: Site("llm.resid_post", 1.0))
    assert "whole number" in refused(lambda: sites("llm.resid_post", "12"))


def test_a_layer_may_be_a_number_of_numpy():
    site = Site("llm.resid_post", np.int64(2))
    assert site == Site("llm.resid_post", 2) and type(site.layer) is int


# Pairs and models

DIRECTION = Direction(torch.ones(128), LAST, "last", norm=1.0, dose=1.0, n=2)
MEASURE = Measure(Metric("first", "logits", "first logit", signed=True), lambda logits: logits[:, 0])
TAKE_PAIRS = {
    "layer_swap": layer_swap,
    "probe": probe,
    "attribute": lambda vlm, pairs: attribute(vlm, pairs, LAST, "last", MEASURE),
    "lens_lead": lens_lead,
    "head_roles": head_roles,
    "find_direction": find_direction,
    "dose_response": lambda vlm, pairs: dose_response(vlm, DIRECTION, pairs),
    "find_arbiter": find_arbiter,
    "horizon": horizon,
    "train_das": lambda vlm, pairs: train_das(vlm, pairs, LAST, "last"),
    "path_patching": lambda vlm, pairs: path_patching(vlm, pairs, Site("llm.resid_pre", 1)),
}
NOTHING_GIVEN = {
    "find_sinks": "find_sinks: no pairs were given",
    "sweep": "a sweep needs prompts",
    "plan_sweep": "a sweep needs prompts",
    "lens": "0 prompts and 1 sites were given",
    "train_tuned_lens": "0 training and 0 held-out images",
    "generate": "no prompts were given",
    "extract": "no prompts were given",
}
OF_ONE_PAIR = {
    "layer_swap": "at least two are needed",
    "probe": "give more examples or fewer folds",
    "head_roles": "at least 4 are needed",
    "find_direction": "1 groups of pairs; too few for 3 parts",
    "dose_response": "1 pairs in 1 groups; slopes need two groups at least",
    "find_arbiter": "none of the 1 pairs of scenes/colour says which image is in conflict",
    "horizon": "at least two are needed",
    "train_das": "1 groups of pairs; too few for 3 parts",
}
TAKE_A_DECODER = {
    **TAKE_PAIRS,
    "find_sinks": find_sinks,
    "sweep": lambda vlm, pairs: sweep(vlm, pairs, grid(layer=[0]), lambda _: None, MEASURE),
    "plan_sweep": lambda vlm, pairs: plan_sweep(vlm, pairs, grid(layer=[0]), lambda _: None),
    "lens": lambda vlm, pairs: lens(vlm, pairs.base, LAST, "last"),
    "train_tuned_lens": lambda vlm, pairs: train_tuned_lens(vlm, pairs.base, pairs.counterfactual, LAST, "last"),
    "compare_lenses": lambda vlm, pairs: compare_lenses(vlm, TunedLens({}, {}, {}), pairs.base, "last"),
    "explore": lambda vlm, pairs: explore(vlm, pairs.base[0]),
    "generate": lambda vlm, pairs: generate(vlm, pairs.base),
    "extract": lambda vlm, pairs: extract(vlm, pairs.base, LAST, spans="last", folder="nowhere"),
}


@pytest.mark.parametrize("name", TAKE_PAIRS)
def test_prompts_are_no_pairs(name, organism, pairs):
    for given in (pairs.base, list(pairs), "scenes/colour"):
        message = refused(lambda given=given: TAKE_PAIRS[name](organism, given))
        assert message == (
            f"{name} takes Pairs, not a {type(given).__name__}; load_pairs(name or folder) gives some, or Pairs(name, "
            "[Pair(...), ...])"
        )


@pytest.mark.parametrize("name", TAKE_PAIRS)
def test_no_pairs_are_told(name, organism):
    message = refused(lambda: TAKE_PAIRS[name](organism, Pairs("mine", ())))
    assert message == f"{name}: no pairs were given ('mine' is empty); at least one is needed"


@pytest.mark.parametrize("name", NOTHING_GIVEN)
def test_no_prompts_are_told(name, organism):
    assert NOTHING_GIVEN[name] in refused(lambda: TAKE_A_DECODER[name](organism, Pairs("mine", ())))


@pytest.mark.parametrize("name", OF_ONE_PAIR)
def test_one_pair_is_too_few_where_something_is_told_of_many(name, organism):
    with pytest.raises((UsageError, WorkError)) as caught:
        TAKE_PAIRS[name](organism, load_pairs("scenes/colour", n=1))
    assert OF_ONE_PAIR[name] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(TAKE_PAIRS.keys() - OF_ONE_PAIR.keys() - {"attribute"}))
def test_one_pair_is_enough_for_a_table(name, organism):
    result = TAKE_PAIRS[name](organism, load_pairs("scenes/colour", n=1))
    assert set(result.table["example"]) == {load_pairs("scenes/colour", n=1)[0].id}


def test_conflict_pairs_of_a_probe_are_pairs(organism, pairs):
    assert refused(lambda: probe(organism, pairs, conflict=pairs.base)).startswith("probe takes Pairs, not a list")
    assert "probe: no pairs were given" in refused(lambda: probe(organism, pairs, conflict=Pairs("mine", ())))


@pytest.mark.parametrize("name", TAKE_A_DECODER)
def test_a_contrastive_model_has_no_decoder(name, clip, pairs):
    message = refused(lambda: TAKE_A_DECODER[name](clip, pairs))
    assert message == f"clip is a contrastive model; {name} takes models with a decoder (VLM)"


@pytest.mark.parametrize("name", TAKE_A_DECODER)
def test_a_name_is_no_model(name, pairs):
    message = refused(lambda: TAKE_A_DECODER[name]("organism", pairs))
    assert message == f"{name} takes a loaded model, not a str; VLM.load(name or folder) gives one"


def test_a_folder_is_no_bank_and_a_number_no_sinks(organism, pairs):
    calls = {
        "context_words": lambda given: context_words(organism, pairs.base, given),
        "named_patches": lambda given: named_patches(organism, bank=given, n=2),
    }
    for name, call in calls.items():
        told = f"{name} takes a ContextBank, not a str; ContextBank.open('/folder') gives one"
        assert refused(lambda call=call: call("/folder")) == told
        assert refused(lambda call=call: call(3)).endswith("not a int; build_bank gives one")
    assert refused(lambda: matched_tokens(3)) == "matched_tokens takes Sinks, not a int; find_sinks gives them"
    assert "dims names no dimension" in refused(lambda: find_sinks(organism, pairs, dims=[]))


def test_layers_and_heads_are_told_by_what_they_are(organism, pairs):
    assert refused(lambda: frozen("image", 1, n_layers="6")).startswith("n_layers of frozen is '6'; a whole number")
    assert "(0, 2)" in refused(lambda: HeadInput("q", 2, 0))
    assert refused(lambda: HeadInput("q", 2, ())) == "HeadInput('q', 2, ()) names no head"
    made = [frozen("image", 1, n_layers=n) for n in (4, 99)]
    assert "n_layers=4; the decoder of organism has 6" in refused(lambda: run(organism, pairs.base, made[0]))
    assert "n_layers=99; the decoder of organism has 6" in refused(lambda: run(organism, pairs.base, made[1]))


# The rest


def test_a_swap_knows_its_places(organism, pairs):
    message = refused(lambda: layer_swap(organism, pairs, site="decoder"))
    assert message == "site 'decoder' of a layer swap is not known; use one of llm, projector, vision"
    message = refused(lambda: layer_swap(organism, pairs, site=LAST))
    assert message.startswith("site Site(") and message.endswith("use one of llm, projector, vision")
    assert "resid_pre" in refused(lambda: layer_swap(organism, pairs, point="output"))


def test_there_is_no_such_embedded_model():
    assert refused(lambda: weights_folder("nope")).startswith("embedded model 'nope' does not exist")


@pytest.mark.parametrize(
    ("n", "said"), [(6, "no class has more than 2 of 12 examples"), (10, "too few for every training part")]
)
def test_too_few_examples_of_a_class_are_told_by_its_name(n, said, organism):
    few = load_pairs("scenes/colour", n=n)
    message = refused(lambda: probe(organism, few, controls=(), spans="last", grouping="scene", n_seeds=1))
    named = {answer for pair in few for answer in (pair.answer, pair.counterfactual_answer)}
    assert said in message and "folds" in message
    assert n == 6 or message.split("'")[1] in named, message


def test_parts_of_identifiability_are_masked_parts(organism, pairs):
    found = lens(organism, pairs.base, LAST, "image", words=["red"])
    message = refused(lambda: identifiability(found, ((0, "red", ((0, 0),)),)))
    assert "is a tuple; a MaskedPart is needed" in message
    assert "takes what lens gives" in refused(lambda: identifiability([found], ()))


def test_a_single_prompt_is_swept(organism, pairs):
    prompt = pairs.base[0]
    assert isinstance(prompt, Prompt)
    edit = lambda point: Replace(Site("llm.resid_post", point.layer), "last", source=[prompt])  # noqa: E731
    assert len(sweep(organism, prompt, grid(layer=[0]), edit, prob(["red"])).table) == 1


def test_a_pair_alone_is_no_pairs(organism):
    pair = Pair("a", picture(1), picture(2), "what colour is the circle?", "red", "blue")
    assert refused(lambda: layer_swap(organism, pair)).startswith("layer_swap takes Pairs, not a Pair;")
    assert len(Pairs("own", [pair])) == 1


def test_gradients_are_not_asked_for_where_there_are_none(organism, pairs):
    measure = logit_diff(pairs.answer, pairs.counterfactual_answer)
    calls = {
        "attribute": lambda: attribute(organism, pairs, [LAST], ["last"], measure),
        "probe": lambda: probe(organism, pairs, controls=()),
        "train_tuned_lens": lambda: train_tuned_lens(organism, pairs.base[:2], pairs.base[2:], [LAST], "all"),
    }
    for name, call in calls.items():
        with torch.inference_mode():
            assert refused(call) == f"{name} needs gradients, which torch.inference_mode() rules out; call it outside"


def test_spans_of_their_own_are_no_spans_of_an_attribution(organism, pairs):
    measure, own = logit_diff(pairs.answer, pairs.counterfactual_answer), Each(("last",) * len(pairs))
    assert "not Each" in refused(lambda: attribute(organism, pairs, [LAST], [("image", own)], measure))


def test_a_vector_is_no_direction(organism, pairs):
    message = refused(lambda: dose_response(organism, torch.ones(2), pairs))
    assert message == "dose_response takes a Direction, not a Tensor; find_direction gives one"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"vector": [1.0, 2.0]}, "a tensor of real numbers, of shape (width,)"),
        ({"vector": torch.ones(2, 2)}, "a tensor of real numbers, of shape (width,)"),
        ({"vector": torch.zeros(2)}, "has norm 0; a finite one above 0"),
        ({"norm": float("inf")}, "norm of a Direction is inf"),
        ({"dose": float("nan")}, "dose of a Direction is nan"),
    ],
    ids=range(5),
)
def test_a_direction_is_a_vector_with_its_place(given, told):
    how = {"vector": torch.ones(2), "site": LAST, "span": "last", "norm": 1.0, "dose": 1.0, "n": 2}
    assert told in refused(lambda: Direction(**(how | given)))


@pytest.mark.parametrize(
    ("dose", "told"),
    [("2", "'2'"), (torch.tensor([1.0, 2.0]), "a Tensor"), (float("nan"), "nan"), (True, "True")],
    ids=range(4),
)
def test_a_dose_is_one_finite_number(dose, told):
    assert refused(lambda: DIRECTION.edit(dose)) == f"the dose of an edit is {told}; one finite number is needed"
    assert DIRECTION.edit(np.float32(2)).scale == 2.0 == DIRECTION.edit(2).scale
