"""Random directions of equal norm, beside which an effect of steering is read."""

import pytest
import torch

from vlm_mech import VLM, Site, Steer, grid, load_pairs, logit_diff, random_directions, sweep
from vlm_mech.errors import UsageError

GIVEN = torch.tensor([3.0, -4.0, 0.0, 12.0])


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_as_long_as_the_direction(dtype, orthogonal):
    given = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = random_directions(given, 20, orthogonal=orthogonal)
    assert found.shape == (20, 64) and found.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert torch.allclose(found.float().norm(dim=1), given.float().norm().expand(20), rtol=limit)
    cosines = torch.nn.functional.cosine_similarity(found.float(), given.float()[None])
    assert (cosines.abs() < limit).all() == orthogonal and cosines.abs().max() < 0.6
    apart = torch.nn.functional.normalize(found.float(), dim=1)
    assert (apart @ apart.T).fill_diagonal_(0).abs().max() < 0.6


def test_the_seed_draws_them_and_few_are_the_first_of_many():
    one, again, other = (random_directions(GIVEN, 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(random_directions(GIVEN, 5)[:3], one)


def test_their_mean_is_no_direction():
    """Uniform on the sphere: the mean of n unit vectors has a norm of about 1 / sqrt(n)."""
    mean = random_directions(torch.tensor([0.0, 2.0, 0.0]), 4000).mean(0) / 2
    assert mean.norm() < 4 / 4000**0.5


WRONG = [
    ([1.0, 2.0], 2, {}, "a tensor of shape .width,., not list"),
    (torch.ones(2, 3), 2, {}, "not shape .2, 3."),
    (torch.ones(3, dtype=torch.int64), 2, {}, "one vector of real numbers"),
    (torch.zeros(3), 2, {}, "has norm 0"),
    (torch.tensor([1.0, float("inf")]), 2, {}, "has norm inf"),
    (torch.ones(3), 0, {}, "n is 0; at least 1"),
    (torch.ones(3), 1, {"seed": -1}, "seed is -1"),
    (torch.ones(1), 1, {"orthogonal": True}, "nothing is orthogonal"),
]


@pytest.mark.parametrize(("given", "n", "more", "told"), WRONG, ids=range(len(WRONG)))
def test_wrong_use_is_one_clear_line(given, n, more, told):
    with pytest.raises(UsageError, match=told) as raised:
        random_directions(given, n, **more)
    assert "\n" not in str(raised.value)


def test_a_direction_that_answers_is_seen_beside_random_ones():
    """The head's own direction of one answer less another moves their difference; random ones as long move it less."""
    vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour", n=4)
    site = Site("llm.resid_post", vlm.llm_layers[-1])
    head = vlm.model.get_output_embeddings().weight.detach()
    encoded = vlm.encode(pairs.base[:1])
    own, other = (vlm.answer_ids(encoded, [each]).item() for each in (pairs[0].answer, pairs[0].counterfactual_answer))
    direction = head[own] - head[other]
    every = torch.stack([direction, *random_directions(direction, 8, seed=1)])
    points = grid(direction=range(9), scale=(2.0, 8.0))

    def steer(point):
        return Steer(site, "last", vector=every[point.direction], scale=point.scale)

    measure = logit_diff([pairs[0].answer] * 4, [pairs[0].counterfactual_answer] * 4)
    effects = sweep(vlm, pairs, points, steer, measure).summary().set_index(["direction", "scale"])["effect"]
    assert effects[0, 8.0] > effects[0, 2.0] > 0
    assert (effects[0, 8.0] > 2 * effects.drop(0).abs()).all()
