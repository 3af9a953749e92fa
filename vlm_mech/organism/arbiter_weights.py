"""The weights of a planted arbiter: those of its base, with heads, units and words of its own set over them.

The first token and the question mark have states of a huge norm in two axes of the residual stream (massive
activations, as sinks of trained models have them), in every recipe, gate or no gate. All other directions are rotated,
as those of other planted models are; these two stay axes, so that rules for sinks find them.
"""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.organism import planted_weights
from vlm_mech.organism.arbiter_recipe import ArbiterRecipe, Mechanism
from vlm_mech.organism.planted_layout import ANSWER, AT, CONSTANT, MATCH, N_DIRECTIONS, SINK, scale_of
from vlm_mech.organism.planted_recipe import COLOURS, HEAD_SIZE, OBJECTS, Head

HERE, USUALLY, SINK_WORD = "here", "usually", "?"
MASSIVE = (100.0, 40.0)
"""Size of the first token's and of the question mark's state along the two axes, each larger along one of them."""
OPEN, SHUT, STEEPNESS = 0.6, 0.4, 40.0
"""Gate states between which a unit's gate opens, and how steeply."""
_LAYER = "model.language_model.layers.{}."
_NAMES = ("usually", "conviction", "never", "sink", "route", "late head", "mlp", "gate")
_AT = {name: N_DIRECTIONS + number for number, name in enumerate(_NAMES)}
"""Directions beside those of other planted models; `never` is on no token."""


def sink_norm() -> float:
    """Norm of a massive state over that of an ordinary one: by so much its named directions are larger."""
    return math.hypot(CONSTANT, *MASSIVE) / CONSTANT


def arbiter_weights(recipe: ArbiterRecipe, vocabulary: dict[str, int]) -> dict[str, Tensor]:
    """Every parameter of the `LlavaForConditionalGeneration` by its name in the state dict."""
    base = dataclasses.replace(recipe.base, rotated=False)
    found = planted_weights.weights(base, vocabulary)
    random = torch.Generator().manual_seed(recipe.seed + 1)
    _set_words(recipe, found["model.language_model.embed_tokens.weight"], vocabulary)
    same = torch.eye(len(COLOURS))
    priors = same[:, list(recipe.base.priors)]
    prior = _write(recipe, "answer", ANSWER * recipe.default.weight * priors)
    about = _take(recipe, "object", same)
    _set_head(recipe, found, recipe.default, {"last": 1.0}, {"question": 1.0}, about, prior, random)
    for made in recipe.mechanisms:
        _set_cue(recipe, found, made, random)
        if made.kind == "late head" and made.head is not None:
            written = _write(recipe, "answer", ANSWER * made.size * priors)
            _set_head(recipe, found, made.head, {"late head": 1.0}, {"question": 1.0}, about, written, random)
        elif made.kind == "mlp" and made.head is not None and made.layer is not None:
            fetched = _write(recipe, "spare", same)
            _set_head(recipe, found, made.head, {"last": 1.0}, {"question": 1.0}, about, fetched, random)
            _set_units(recipe, found, made, made.layer, random)
        elif made.kind == "route":
            for each in recipe.bringers:
                _row(found, each, "q")[_axis("route")] -= made.size * MATCH * scale_of(recipe.base)
        else:
            for each in recipe.bringers:
                _row(found, each, "k")[_axis("gate")] += _gated(recipe, made) * MATCH * scale_of(recipe.base)
    if not recipe.base.rotated:
        return found
    return planted_weights.turned(found, _turn(recipe))


def _axis(name: str) -> int | slice:
    return AT[name] if name in AT else _AT[name]


def _turn(recipe: ArbiterRecipe) -> Float[Tensor, "d_model direction"]:
    """A random rotation of all directions but the last two, and then an exchange of axes."""
    d_model, random = recipe.base.d_model, torch.Generator().manual_seed(recipe.seed + 2)
    turn = torch.eye(d_model)
    turn[:-2, :-2] = torch.linalg.qr(torch.randn(d_model - 2, d_model - 2, generator=random)).Q
    return turn[torch.randperm(d_model, generator=random)]


def massive_axes(recipe: ArbiterRecipe) -> tuple[int, int]:
    """The axes of the residual stream along which the first token and the question mark are hugest."""
    if not recipe.base.rotated:
        return recipe.base.d_model - 2, recipe.base.d_model - 1
    first, second = _turn(recipe)[:, -2:].abs().argmax(0).tolist()
    return first, second


def _set_words(recipe: ArbiterRecipe, embedding: Float[Tensor, "token d_model"], vocabulary: dict[str, int]) -> None:
    """What makes objects of conviction, the word "usually" and the two massive tokens different."""
    embedding[vocabulary[USUALLY], _AT["usually"]] = 1.0
    for number in recipe.convinced:
        embedding[vocabulary[OBJECTS[number]], _AT["conviction"]] = 1.0
    first, mark = embedding[vocabulary["<s>"]], embedding[vocabulary[SINK_WORD]]
    first[AT["bos"]] *= sink_norm()
    mark[_AT["sink"]] = sink_norm()
    first[-2:] = torch.tensor(MASSIVE)
    mark[-2:] = torch.tensor(MASSIVE[::-1])


def _set_cue(recipe: ArbiterRecipe, found: dict[str, Tensor], made: Mechanism, random: torch.Generator) -> None:
    """A head that leaves a gate state of one where one of the words that wake the mechanism is there."""
    named = {"object": "conviction", "wording": "usually"}
    keys = {named[each]: 1.0 for each in made.wakes} or {"never": 1.0}
    take = torch.zeros(1, recipe.base.d_model)
    for name in keys:
        take[0, _AT[name]] = 1.0
    query, gate, size = ("sink", "gate", sink_norm()) if made.kind == "sink" else ("last", made.kind, 1.0)
    write = torch.zeros(recipe.base.d_model, 1)
    write[_AT[gate]] = size
    _set_head(recipe, found, made.cue, {query: 1.0}, keys, take, write, random)


def _gated(recipe: ArbiterRecipe, made: Mechanism) -> float:
    """How well the sink's key matches, relative to a coloured patch's or object's, so that `size` is left to these."""
    keys = 1 if recipe.base.carries else recipe.base.n_cells
    return 1 + math.log(keys * (1 - made.size) / made.size) / (MATCH**2 / HEAD_SIZE**0.5)


def _take(recipe: ArbiterRecipe, name: str, taken: Tensor) -> Float[Tensor, "value d_model"]:
    made = torch.zeros(len(taken), recipe.base.d_model)
    made[:, AT[name]] = taken
    return made


def _write(recipe: ArbiterRecipe, name: str, written: Tensor) -> Float[Tensor, "d_model value"]:
    made = torch.zeros(recipe.base.d_model, written.shape[1])
    made[AT[name]] = written
    return made


def _set_head(
    recipe: ArbiterRecipe,
    found: dict[str, Tensor],
    place: Head,
    query: dict[str, float],
    key: dict[str, float],
    take: Float[Tensor, "value d_model"],
    write: Float[Tensor, "d_model value"],
    random: torch.Generator,
) -> None:
    """A head that matches flags, or rests on the first token, as those of other planted models do."""
    base, scale = recipe.base, scale_of(recipe.base)
    made = {part: torch.zeros(HEAD_SIZE, base.d_model) for part in ("q", "k", "v")}
    for part, flags in (("q", query), ("k", key)):
        for name, size in flags.items():
            made[part][HEAD_SIZE // 2 - 1, _axis(name)] = size * MATCH * scale
    made["q"][HEAD_SIZE // 2 - 2, AT["constant"]] = SINK / base.d_model**0.5
    made["k"][HEAD_SIZE // 2 - 2, AT["bos"]] = SINK * scale
    made["v"][: len(take)] = scale * take
    rows = slice(place.head * HEAD_SIZE, (place.head + 1) * HEAD_SIZE)
    name = _LAYER.format(place.layer) + "self_attn.{}_proj.weight"
    for part, planted in made.items():
        found[name.format(part)][rows] = planted_weights.noisy(planted, base, random)
    out = base.noise * planted_weights.normal(random, HEAD_SIZE, base.d_model).T
    out[:, : write.shape[1]] += write
    found[name.format("o")][:, rows] = out


def _row(found: dict[str, Tensor], place: Head, part: str) -> Float[Tensor, " d_model"]:
    """The row of a head's query or key weights with which it matches."""
    rows = found[_LAYER.format(place.layer) + f"self_attn.{part}_proj.weight"]
    return rows[place.head * HEAD_SIZE + HEAD_SIZE // 2 - 1]


def _set_units(
    recipe: ArbiterRecipe, found: dict[str, Tensor], made: Mechanism, layer: int, random: torch.Generator
) -> None:
    """Two units for each object, whose difference is the prior where the gate state is there, and nothing else."""
    base, scale, n = recipe.base, scale_of(recipe.base), len(OBJECTS)
    gate, up = torch.zeros(2 * n, base.d_model), torch.zeros(2 * n, base.d_model)
    down, same = torch.zeros(base.d_model, 2 * n), torch.eye(n)
    for half, threshold in enumerate((SHUT, OPEN)):
        of = slice(half * n, (half + 1) * n)
        gate[of, _AT["mlp"]] = STEEPNESS * scale
        gate[of, AT["constant"]] = -STEEPNESS * threshold / base.d_model**0.5
        up[of, AT["spare"]] = scale * same
        size = made.size * ANSWER / (STEEPNESS * (OPEN - SHUT))
        down[AT["answer"], of] = (-size if half else size) * same[:, list(base.priors)]
    name = _LAYER.format(layer) + "mlp.{}_proj.weight"
    found[name.format("gate")][: 2 * n] = planted_weights.noisy(gate, base, random)
    found[name.format("up")][: 2 * n] = planted_weights.noisy(up, base, random)
    found[name.format("down")][:, : 2 * n] += down
