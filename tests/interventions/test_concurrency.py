"""Passes are in eval mode whatever the model's own mode, and take turns, whoever runs them."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.zoo.tiny import tiny_model, tiny_processor
from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.interventions.attention import Router, aside
from vlm_mech.interventions.specification import Ablate, Knockout
from vlm_mech.interventions.trace import generate, read, run
from vlm_mech.models.vlm import VLM
from vlm_mech.sweeps.engine import Engine


@pytest.fixture(scope="module")
def models():
    return [VLM(tiny_model(seed=seed), tiny_processor(), check=False) for seed in (0, 1)]


def test_a_model_in_training_mode_runs_in_eval_mode_and_goes_on_training(prompts):
    vlm = VLM(tiny_model(), tiny_processor(), check=False)
    for layer in vlm.model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    encoded, cut = vlm.encode(prompts), Knockout("last", "image", 1)
    site = Site("llm.resid_post", 2)
    ways = {
        "run": lambda: run(vlm, encoded, cut).logits,
        "read": lambda: read(vlm, encoded, site)[site],
        "generate": lambda: generate(vlm, encoded, cut, max_new_tokens=4).ids,
        "engine": lambda: Engine(vlm, encoded).answers([cut])[0],
    }
    quiet = {name: way() for name, way in ways.items()}
    vlm.model.train()
    vlm.model.model.vision_tower.eval()
    modes = [module.training for module in vlm.model.modules()]
    with torch.no_grad():
        assert not torch.equal(vlm.model(**encoded.inputs).logits, vlm.model(**encoded.inputs).logits)
    for name, way in ways.items():
        assert torch.equal(way(), quiet[name]), name
    assert [module.training for module in vlm.model.modules()] == modes
    with pytest.raises(UsageError):
        run(vlm, encoded, Knockout("last", "all", 1))
    assert [module.training for module in vlm.model.modules()] == modes


def jobs(models, prompts):
    """Runs of two models, with and without cuts, that must not see each other."""
    edits = (None, Knockout("last", "image", (0, 1)), Ablate(Site("llm.mlp_out", 1), "question"))
    return [(vlm, vlm.encode(prompts), edit) for vlm in models for edit in edits] * 2


def test_threads_give_what_one_after_another_gives(models, prompts):
    todo = jobs(models, prompts)
    alone = [run(*job).logits for job in todo]
    with ThreadPoolExecutor(6) as pool:
        together = [made.logits for made in pool.map(lambda job: run(*job), todo)]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))

    async def gathered():
        return await asyncio.gather(*(asyncio.to_thread(run, *job) for job in todo))

    assert all(torch.equal(one, other.logits) for one, other in zip(alone, asyncio.run(gathered()), strict=True))
    assert torch.equal(run(*todo[1]).logits, alone[1])


def test_the_router_is_placed_once_and_routes_nothing_outside(models, prompts):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    vlm = models[0]
    encoded = vlm.encode(prompts)
    with torch.no_grad():
        before = vlm.model(**encoded.inputs).logits
    run(vlm, encoded, Knockout("last", "image", 1))
    placed = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    assert isinstance(placed["sdpa"], Router) and not isinstance(placed["sdpa"].original, Router)
    run(vlm, encoded, Knockout("last", "image", 2))
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == placed
    with torch.no_grad():
        assert torch.equal(vlm.model(**encoded.inputs).logits, before)


def test_a_function_put_around_the_router_is_routed_once(models, prompts, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    vlm, cut = models[0], Knockout("last", "image", 1)
    expected = run(vlm, prompts, cut)
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", lambda *given, **named: inner(*given, **named))
    again = run(vlm, prompts, cut)
    assert torch.equal(again.logits, expected.logits) and again.receipts[0].n_edges == expected.receipts[0].n_edges


def test_a_trace_within_a_trace_is_refused_in_one_line(models, prompts):
    vlm = models[0]
    encoded = vlm.encode(prompts)

    def nested(ids, scores):
        with aside(vlm):
            run(vlm, encoded)
        return scores

    with pytest.raises(UsageError, match="a trace is open"):
        generate(vlm, encoded, Ablate(Site("llm.mlp_out", 1), "generated"), max_new_tokens=2, logits_processor=[nested])
    with pytest.raises(UsageError, match="a trace of .* is open"):
        with vlm.trace(encoded):
            run(vlm, encoded)
    assert run(vlm, encoded).logits.isfinite().all()
