"""The weights that follow from a recipe: every tensor of a LLaVA, set by hand.

Pictures have mid-grey patches and coloured ones. The tower hands on the mean colour of each patch and its left-right
contrast (the texture); the projector turns the colour, a corner of the RGB cube, into a code of its own and a flag
"coloured". In the decoder a constant on every token, larger than all else, makes RMSNorm divide by nearly the same
number everywhere, so that reading weights can have it folded in.

Everything unplanted is random and writes about `noise` times as much as what is planted. The decoder is made in a basis
whose axes have names and then rotated as a whole, which RMSNorm with unit weights does not notice.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from vlm_mech.organism.planted_layout import (
    ANSWER,
    AT,
    CONSTANT,
    CORNERS,
    FEED_FORWARD,
    LARGEST_TEXTURE,
    MARK,
    MATCH,
    PATCH,
    SATURATION,
    SHARPNESS,
    SIDE,
    SINK,
    STEP,
    THRESHOLD,
    TOWER_CONSTANT,
    TOWER_LAYERS,
    TOWER_NOISE,
    TOWER_WIDTH,
    TURN,
    UNEMBEDDING,
    scale_of,
    sink_patch,
)
from vlm_mech.organism.planted_recipe import COLOURS, HEAD_SIZE, OBJECTS, PLACES, STORES, Head, Recipe
from vlm_mech.organism.planted_units import unit_weights

_LAYER = "model.language_model.layers.{}."
_TOWER = "model.vision_tower."
_TOWER_LAYER = _TOWER + "encoder.layers.{}."


@dataclass(frozen=True, eq=False)
class Reading:
    """What a head does: which flags it matches, what it takes from where it attends, and what it writes.

    `take` is value x d_model, as applied to the residual stream itself; `write` is d_model x value.
    """

    query: str
    key: str
    take: Float[Tensor, "value d_model"]
    write: Float[Tensor, "d_model value"]


def weights(recipe: Recipe, vocabulary: dict[str, int]) -> dict[str, Tensor]:
    """Every parameter of the `LlavaForConditionalGeneration` by its name in the state dict."""
    random = torch.Generator().manual_seed(recipe.seed)
    codes = _colour_codes(recipe, random)
    found = _tower(recipe, random) | _projector(recipe, codes, random) | _ends(recipe, vocabulary, random)
    jobs = _jobs(recipe, codes, random)
    for layer in range(recipe.n_layers):
        found |= _attention(recipe, layer, jobs, random) | _feed_forward(recipe, layer, random)
    if not recipe.rotated:
        return found
    return turned(found, torch.linalg.qr(torch.randn(recipe.d_model, recipe.d_model, generator=random)).Q)


def normal(random: torch.Generator, *shape: int) -> Tensor:
    """Random weights that keep the scale of normed inputs: standard deviation 1 / sqrt(fan in)."""
    return torch.randn(*shape, generator=random) * shape[-1] ** -0.5


def noisy(planted: Tensor, recipe: Recipe, random: torch.Generator) -> Tensor:
    """Planted weights plus noise relative to the largest of them."""
    return planted + recipe.noise * planted.abs().max() * normal(random, *planted.shape)


def _colour_codes(recipe: Recipe, random: torch.Generator) -> Float[Tensor, "colour code"]:
    """Unit vectors: the axes, or six of them in four dimensions, the least similar of many draws.

    Where a name has two pieces no six of four dimensions tell both apart by chance: one dimension says the half, and
    three directions of a plane the place in it, all of it turned at random.
    """
    n_colours = len(COLOURS)
    if not recipe.superposed:
        return torch.eye(n_colours)
    if recipe.answer == "pieces":
        angles = 2 * torch.pi * torch.arange(n_colours) / len(PLACES)
        half = torch.where(torch.arange(n_colours) < len(PLACES), 1.0, -1.0)
        made = torch.stack([half, 2**0.5 * angles.cos(), 2**0.5 * angles.sin(), torch.zeros(n_colours)], dim=1)
        turned = made / 3**0.5 @ torch.linalg.qr(torch.randn(4, 4, generator=random)).Q
        return torch.cat([turned, torch.zeros(n_colours, n_colours - 4)], dim=1)
    drawn = torch.randn(500, n_colours, 4, generator=random)
    drawn = drawn / drawn.norm(dim=-1, keepdim=True)
    similar = (drawn @ drawn.mT - 2 * torch.eye(n_colours)).amax(dim=(1, 2))
    return torch.cat([drawn[similar.argmin()], torch.zeros(n_colours, n_colours - 4)], dim=1)


# Tower and projector


def _tower_basis(random: torch.Generator) -> Float[Tensor, "direction width"]:
    """Orthonormal directions that LayerNorm leaves alone, because their entries sum to zero: the constant, three for
    the mean colour, three for the texture."""
    drawn = torch.randn(TOWER_WIDTH, 7, generator=random)
    return torch.linalg.qr(drawn - drawn.mean(0)).Q.T


def _mark(recipe: Recipe) -> Float[Tensor, " width"]:
    """One direction more of that kind, which marks the patch to whose token sinks attend."""
    basis = _tower_basis(torch.Generator().manual_seed(recipe.seed))
    drawn = torch.randn(TOWER_WIDTH, generator=torch.Generator().manual_seed(recipe.seed + 1))
    centred = drawn - drawn.mean()
    free = centred - basis.T @ (basis @ centred)
    return free / free.norm()


def _tower(recipe: Recipe, random: torch.Generator) -> dict[str, Tensor]:
    """A tower that hands on what the patch embedding wrote; its blocks add noise."""
    basis = _tower_basis(torch.Generator().manual_seed(recipe.seed))
    mean = torch.full((PATCH, PATCH), 1 / PATCH**2)
    contrast = mean * torch.where(torch.arange(PATCH) < PATCH // 2, 1.0, -1.0)
    patch = torch.zeros(TOWER_WIDTH, 3, PATCH, PATCH)
    for channel in range(3):
        patch[:, channel] += basis[1 + channel][:, None, None] * mean + basis[4 + channel][:, None, None] * contrast
    patch += recipe.noise * torch.randn(patch.shape, generator=random) / PATCH
    positions = repeat(TOWER_CONSTANT * basis[0], "width -> pos width", pos=SIDE**2 + 1).clone()
    if recipe.sinks:
        # The first position is the class token's.
        positions[1 + sink_patch(recipe)] += MARK * _mark(recipe)
    found = {
        "embeddings.class_embedding": torch.randn(TOWER_WIDTH, generator=random),
        "embeddings.patch_embedding.weight": patch,
        "embeddings.position_embedding.weight": noisy(positions, recipe, random),
    }
    found = {_TOWER + name: value for name, value in found.items()}
    for name in ("pre_layrnorm", "post_layernorm"):
        found |= _layer_norm(_TOWER + name)
    for layer in range(TOWER_LAYERS):
        found |= _tower_block(recipe, _TOWER_LAYER.format(layer), random)
    return found


def _layer_norm(name: str) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(TOWER_WIDTH), f"{name}.bias": torch.zeros(TOWER_WIDTH)}


def _tower_block(recipe: Recipe, name: str, random: torch.Generator) -> dict[str, Tensor]:
    found = _layer_norm(name + "layer_norm1") | _layer_norm(name + "layer_norm2")
    shapes = {f"self_attn.{part}_proj": (TOWER_WIDTH, TOWER_WIDTH) for part in ("q", "k", "v", "out")}
    shapes |= {"mlp.fc1": (FEED_FORWARD, TOWER_WIDTH), "mlp.fc2": (TOWER_WIDTH, FEED_FORWARD)}
    for part, shape in shapes.items():
        size = TOWER_NOISE * recipe.noise if part in ("self_attn.out_proj", "mlp.fc2") else 1.0
        found[f"{name}{part}.weight"] = size * normal(random, *shape)
        found[f"{name}{part}.bias"] = torch.zeros(shape[0])
    return found


def _projector(recipe: Recipe, codes: Float[Tensor, "colour code"], random: torch.Generator) -> dict[str, Tensor]:
    """Two layers that make colour codes, the flag "coloured" and the texture out of patch means and contrasts.

    Units 0-5 rise linearly once their colour is reached, units 6-11 do so `STEP` later: their difference is a step, the
    same for all shades of a colour. Units 12-17 come in pairs GELU(x), GELU(-x), whose difference is x.
    """
    n_colours, d_model = len(COLOURS), recipe.d_model
    basis = _tower_basis(torch.Generator().manual_seed(recipe.seed))
    unit = TOWER_CONSTANT / TOWER_WIDTH**0.5
    first, bias = torch.zeros(d_model, TOWER_WIDTH), torch.zeros(d_model)
    colour = SHARPNESS * unit * CORNERS @ basis[1:4]
    texture = SHARPNESS * unit * basis[4:7]
    first[:18] = torch.cat([colour, colour, texture, -texture])
    bias[:n_colours] = -SHARPNESS * THRESHOLD
    bias[n_colours : 2 * n_colours] = -SHARPNESS * THRESHOLD - STEP
    second, constants = torch.zeros(d_model, d_model), torch.zeros(d_model)
    full = SHARPNESS * (3 * SATURATION - THRESHOLD)
    second[AT["colour"], :n_colours] = codes.T / full
    second[AT["coloured"], :n_colours] = 1 / STEP
    second[AT["coloured"], n_colours : 2 * n_colours] = -1 / STEP
    second[AT["texture"], 12:15] = torch.eye(3) / (SHARPNESS * LARGEST_TEXTURE)
    second[AT["texture"], 15:18] = -torch.eye(3) / (SHARPNESS * LARGEST_TEXTURE)
    constants[AT["constant"]], constants[AT["image"]] = CONSTANT, 1.0
    if recipe.sinks:
        first[18], bias[18] = SHARPNESS * unit * _mark(recipe), -SHARPNESS * MARK / 2
        second[AT["marked"], 18] = 2 / (SHARPNESS * MARK)
    name = "model.multi_modal_projector."
    return {
        name + "linear_1.weight": noisy(first, recipe, random),
        name + "linear_1.bias": bias,
        name + "linear_2.weight": noisy(second, recipe, random),
        name + "linear_2.bias": constants,
    }


# Decoder


def _ends(recipe: Recipe, vocabulary: dict[str, int], random: torch.Generator) -> dict[str, Tensor]:
    """Embeddings, final norm and head."""
    embedding = torch.zeros(len(vocabulary), recipe.d_model)
    embedding[:, AT["constant"]] = CONSTANT
    embedding[vocabulary["<s>"], AT["bos"]] = 1.0
    embedding[vocabulary["assistant"], AT["last"]] = 1.0
    for number, word in enumerate(OBJECTS):
        embedding[vocabulary[word], AT["question"]] = 1.0
        embedding[vocabulary[word], AT["object"].start + number] = 1.0
    head = torch.zeros(len(vocabulary), recipe.d_model)
    if recipe.answer == "word":
        for number, word in enumerate(COLOURS):
            head[vocabulary[word], AT["answer"].start + number] = UNEMBEDDING * scale_of(recipe)
    else:
        _set_two_tokens(recipe, vocabulary, embedding, head)
    return {
        "model.language_model.embed_tokens.weight": noisy(embedding, recipe, random),
        "model.language_model.norm.weight": torch.ones(recipe.d_model),
        "lm_head.weight": noisy(head, recipe, random),
    }


def _set_two_tokens(recipe: Recipe, vocabulary: dict[str, int], embedding: Tensor, head: Tensor) -> None:
    """Ends of answers of two tokens.

    Which of the two comes now is said by flags on the tokens before it, so that `last` can be wherever the picture is
    to be read: at the prompt's end and at a first piece, which looks the same to all heads, or at the article alone.
    """
    scale = scale_of(recipe)
    words = [answer.split() for answer in recipe.answers]
    firsts, seconds = ([vocabulary[word] for word in dict.fromkeys(each)] for each in zip(*words, strict=True))
    embedding[vocabulary["assistant"], AT["begin"]] = 1.0
    embedding[firsts, AT["last"]] = 1.0
    embedding[seconds, AT["end"]] = 1.0
    head[firsts, AT["begin"]] = TURN * scale
    head[seconds, AT["last"]] = TURN * scale
    head[vocabulary["</s>"], AT["end"]] = TURN * scale
    for number, (first, second) in enumerate(words):
        head[vocabulary[second], AT["answer"].start + number] = UNEMBEDDING * scale
        if recipe.answer == "pieces":
            head[vocabulary[first], AT["answer"].start + number] = UNEMBEDDING * scale
    if recipe.answer == "pieces":
        head[seconds, AT["begin"]] = -TURN * scale
    else:
        embedding[vocabulary["assistant"], AT["last"]] = 0.0


def _jobs(
    recipe: Recipe, codes: Float[Tensor, "colour code"], random: torch.Generator
) -> dict[tuple[int, int], Reading]:
    """What each planted head does, by layer and head."""
    same = torch.eye(len(COLOURS))
    colours = ("unseen", same) if recipe.blind else ("colour", codes)
    texture = ("unseen" if recipe.blind else "texture", torch.eye(3))
    reader, into, size = ("question", "carrier", 1.0) if recipe.carries else ("last", "answer", ANSWER)
    found: dict[tuple[int, int], Reading] = {}
    for each in recipe.reads:
        found[_place(each)] = _reading(recipe, reader, "coloured", colours, (into, size * each.weight * same))
    for each in recipe.carries:
        answer = ("answer", ANSWER * each.weight * same)
        found[_place(each)] = _reading(recipe, "last", "question", ("carrier", same), answer)
    for each in recipe.decoys:
        mapping = recipe.decoy_gain * torch.randn(len(COLOURS), 3, generator=random)
        found[_place(each)] = _reading(recipe, "last", "coloured", texture, ("answer", mapping))
    if recipe.suppressor is not None:
        prior = ("answer", ANSWER * recipe.suppressor.weight * same[:, list(recipe.priors)])
        found[_place(recipe.suppressor)] = _reading(recipe, "last", "question", ("object", same), prior)
    for each, store in zip(recipe.backups, STORES, strict=False):
        found[_place(each)] = _reading(recipe, "last", "coloured", colours, (store, same))
    if recipe.copy is not None:
        found[_place(recipe.copy)] = _reading(recipe, "last", "coloured", colours, ("spare", same))
    if recipe.fetch is not None:
        found[_place(recipe.fetch)] = _reading(recipe, "last", "question", ("object", same), ("spare", same))
    for each in recipe.sinks:
        nothing = ("answer", torch.zeros(len(COLOURS), 1))
        found[_place(each)] = _reading(recipe, "constant", "marked", ("marked", torch.eye(1)), nothing)
    return found


def _place(head: Head) -> tuple[int, int]:
    return head.layer, head.head


def _reading(recipe: Recipe, query: str, key: str, take: tuple[str, Tensor], write: tuple[str, Tensor]) -> Reading:
    """A head that takes (subspace, value x subspace) and writes (subspace, subspace x value)."""
    taken = torch.zeros(len(take[1]), recipe.d_model)
    taken[:, AT[take[0]].start : AT[take[0]].start + take[1].shape[1]] = take[1]
    written = torch.zeros(recipe.d_model, write[1].shape[1])
    written[AT[write[0]]] = write[1]
    return Reading(query, key, taken, written)


def _attention(
    recipe: Recipe, layer: int, jobs: dict[tuple[int, int], Reading], random: torch.Generator
) -> dict[str, Tensor]:
    """One layer's attention: planted heads, and random ones that write little."""
    shape = (recipe.n_heads, HEAD_SIZE, recipe.d_model)
    made = {part: normal(random, *shape) for part in ("q", "k", "v")}
    made["o"] = recipe.noise * rearrange(normal(random, *shape), "head value d_model -> head d_model value")
    for head in range(recipe.n_heads):
        if (layer, head) in jobs:
            for part, planted in _head(recipe, jobs[layer, head]).items():
                made[part][head] = noisy(planted, recipe, random)
            made["o"][head] += recipe.noise * normal(random, HEAD_SIZE, recipe.d_model).T
    made["o"] = rearrange(made["o"], "head d_model value -> d_model (head value)")
    name = _LAYER.format(layer) + "self_attn."
    return {f"{name}{part}_proj.weight": _stacked(value) for part, value in made.items()}


def _stacked(value: Tensor) -> Tensor:
    """Heads below one another, as query, key and value weights have them; output weights are so already."""
    return value if value.ndim == 2 else rearrange(value, "head value d_model -> (head value) d_model")


def _head(recipe: Recipe, reading: Reading) -> dict[str, Tensor]:
    """Query, key, value and output weights of one planted head, each head x ...

    Query and key meet in the rotary pair that turns slowest, so that positions hardly matter. In the pair next to it
    every query finds the first token, where there is nothing to take: what finds no key of its own rests there.
    """
    n_pairs, scale = HEAD_SIZE // 2, scale_of(recipe)
    made = {part: torch.zeros(HEAD_SIZE, recipe.d_model) for part in ("q", "k", "v")}
    made["o"] = torch.zeros(recipe.d_model, HEAD_SIZE)
    flag = CONSTANT if reading.query == "constant" else 1.0
    made["q"][n_pairs - 1, AT[reading.query]] = MATCH * scale / flag
    made["k"][n_pairs - 1, AT[reading.key]] = MATCH * scale
    made["q"][n_pairs - 2, AT["constant"]] = SINK / recipe.d_model**0.5
    made["k"][n_pairs - 2, AT["bos"]] = SINK * scale
    made["v"][: len(reading.take)] = scale * reading.take
    made["o"][:, : reading.write.shape[1]] = reading.write
    return made


def _feed_forward(recipe: Recipe, layer: int, random: torch.Generator) -> dict[str, Tensor]:
    """One layer's norms and gated MLP: random units that write little, and planted ones."""
    d_model = recipe.d_model
    gate, up = normal(random, FEED_FORWARD, d_model), normal(random, FEED_FORWARD, d_model)
    down = recipe.noise * normal(random, d_model, FEED_FORWARD)
    for planted in unit_weights(recipe, layer):
        numbers = list(planted.numbers)
        gate[numbers] = noisy(planted.gate, recipe, random)
        up[numbers] = noisy(planted.up, recipe, random)
        down[:, numbers] += planted.down
    name = _LAYER.format(layer)
    found = {f"{name}mlp.{part}_proj.weight": value for part, value in (("gate", gate), ("up", up), ("down", down))}
    norms = ("input_layernorm", "post_attention_layernorm")
    return found | {f"{name}{norm}.weight": torch.ones(d_model) for norm in norms}


def turned(found: dict[str, Tensor], turn: Float[Tensor, "d_model direction"]) -> dict[str, Tensor]:
    """The same decoder in another orthonormal basis of its residual stream, whose columns are the old axes."""
    reading = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
    reading += ("embed_tokens.weight", "lm_head.weight")
    writing = ("o_proj.weight", "down_proj.weight", "linear_2.weight", "linear_2.bias")
    made = dict(found)
    for name, value in found.items():
        if name.startswith(_TOWER):
            continue
        if name.endswith(reading):
            made[name] = value @ turn.T
        elif name.endswith(writing):
            made[name] = turn @ value
    return made
