"""Public calls given the wrong thing end in one line that says what was given and what would be right."""

import numpy as np
import pytest
import torch

from tests.zoo.tiny import picture
from vlm_mech import (
    VLM,
    DualEncoder,
    Each,
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
    attribute,
    compare_lenses,
    extract,
    generate,
    grid,
    identifiability,
    layer_swap,
    lens,
    lens_lead,
    load_pairs,
    logit_diff,
    plan_sweep,
    prob,
    probe,
    read,
    sites,
    sweep,
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

MEASURE = Measure(Metric("first", "logits", "first logit", signed=True), lambda logits: logits[:, 0])
TAKE_PAIRS = {
    "layer_swap": layer_swap,
    "probe": probe,
    "attribute": lambda vlm, pairs: attribute(vlm, pairs, LAST, "last", MEASURE),
    "lens_lead": lens_lead,
}
TAKE_A_DECODER = {
    **TAKE_PAIRS,
    "sweep": lambda vlm, pairs: sweep(vlm, pairs, grid(layer=[0]), lambda _: None, MEASURE),
    "plan_sweep": lambda vlm, pairs: plan_sweep(vlm, pairs, grid(layer=[0]), lambda _: None),
    "lens": lambda vlm, pairs: lens(vlm, pairs.base, LAST, "last"),
    "train_tuned_lens": lambda vlm, pairs: train_tuned_lens(vlm, pairs.base, pairs.counterfactual, LAST, "last"),
    "compare_lenses": lambda vlm, pairs: compare_lenses(vlm, TunedLens({}, {}, {}), pairs.base, "last"),
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


def test_conflict_pairs_of_a_probe_are_pairs(organism, pairs):
    assert refused(lambda: probe(organism, pairs, conflict=pairs.base)).startswith("probe takes Pairs, not a list")


@pytest.mark.parametrize("name", TAKE_A_DECODER)
def test_a_contrastive_model_has_no_decoder(name, clip, pairs):
    message = refused(lambda: TAKE_A_DECODER[name](clip, pairs))
    assert message == f"clip is a contrastive model; {name} takes models with a decoder (VLM)"


@pytest.mark.parametrize("name", TAKE_A_DECODER)
def test_a_name_is_no_model(name, pairs):
    message = refused(lambda: TAKE_A_DECODER[name]("organism", pairs))
    assert message == f"{name} takes a loaded model, not a str; VLM.load(name or folder) gives one"


# The rest


def test_a_swap_knows_its_places(organism, pairs):
    message = refused(lambda: layer_swap(organism, pairs, site="decoder"))
    assert message == "site 'decoder' of a layer swap is not known; llm, projector, vision are"
    message = refused(lambda: layer_swap(organism, pairs, site=LAST))
    assert message.startswith("site Site(") and message.endswith("llm, projector, vision are")
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
