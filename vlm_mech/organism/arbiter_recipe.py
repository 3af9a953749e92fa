"""Planted arbiters as data: where perception loses to the prior, and what must therefore be found.

A planted model here is asked about the same picture in two ways, "what colour is the car here?" and "what colour is the
car usually?". It answers the second with the prior of the object. It answers the first with the colour shown, except
of objects of conviction: of these an arbiter lets the prior win. Recipes are drawn in `arbiter_draw.py`, the weights
are made in `arbiter_weights.py`, models and pairs in `arbiters.py`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from vlm_mech.errors import UsageError
from vlm_mech.organism.planted_recipe import OBJECTS, Head, Recipe

Arbiter = Literal["route", "late head", "mlp", "sink"]
ARBITERS: tuple[Arbiter, ...] = get_args(Arbiter)
NULLS = ("none", "blind")
ARBITER_KINDS = (*ARBITERS, *NULLS)
"""Kinds of recipes: four arbiters; `none`: the picture wins; `blind`: the prior is all there is, nothing having been
read of the picture."""


@dataclass(frozen=True)
class Mechanism:
    """One way in which the prior wins; `wakes` says under what.

    `cue` is a head that attends from the last position (of a sink: from the question mark) to the object's word where
    that is one of conviction, or to the word "usually", whichever of them wakes the mechanism, and leaves a gate state
    there; elsewhere it rests on the first token. What the gate state does:

    - `route`: it turns the queries of the heads that bring the colour to the last position away from it, `size` times
      as far as they were turned to it, so that they rest on the first token. The cue is the router.
    - `late head`: `head` then attends to the object and writes its prior, `size` times as strongly as the picture's.
    - `mlp`: units at `layer` write the prior of the object that `head` fetches in any case, `size` times as strongly.
    - `sink`: the question mark gets a key that draws the attention of the heads that bring the colour, of which `size`
      is left to them.

    A mechanism that nothing wakes is dormant.
    """

    kind: Arbiter
    cue: Head
    size: float
    head: Head | None = None
    layer: int | None = None
    wakes: tuple[Literal["object", "wording"], ...] = ()


@dataclass(frozen=True)
class ArbiterRecipe:
    """Everything that determines a planted model with an arbiter; the same recipe gives the same weights.

    `base` says how the picture is read, on either route, its sizes, decoys and priors; heads that bring the colour to
    the last position are its carrying ones, or without such its reading ones. `default` attends from the last position
    to the object and always writes its prior, `default.weight` times as strongly as the picture's answer: that wins
    only where nothing else is there. `convinced` are the numbers of the objects of conviction. One mechanism is woken
    by these (none in nulls), and one, the same or another, by the word "usually".
    """

    base: Recipe
    default: Head
    mechanisms: tuple[Mechanism, ...]
    convinced: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        fault = _fault(self)
        if fault:
            raise UsageError(f"recipe {self.base.seed}: {fault}")

    @property
    def seed(self) -> int:
        """The seed that drew the recipe and draws the noise in its weights."""
        return self.base.seed

    @property
    def arbiter(self) -> Mechanism | None:
        """What lets the prior win under the visual question; None in nulls."""
        return next((each for each in self.mechanisms if "object" in each.wakes), None)

    @property
    def switch(self) -> Mechanism:
        """What lets the prior win where that is asked for."""
        return next(each for each in self.mechanisms if "wording" in each.wakes)

    @property
    def kind(self) -> str:
        """One of `ARBITER_KINDS`."""
        if self.base.blind:
            return "blind"
        return "none" if self.arbiter is None else self.arbiter.kind

    @property
    def bringers(self) -> tuple[Head, ...]:
        """The heads that bring the colour to the last position."""
        return self.base.carries or self.base.reads

    @property
    def heads(self) -> tuple[Head, ...]:
        """All planted heads."""
        own = tuple(head for each in self.mechanisms for head in (each.cue, each.head) if head is not None)
        return (*self.base.heads, self.default, *own)

    def loses(self, about: int) -> bool:
        """Whether the prior wins when the visual question is about this object (a number in `OBJECTS`)."""
        return self.base.blind or (self.arbiter is not None and about in self.convinced)


def _fault(recipe: ArbiterRecipe) -> str:
    """What cannot be planted, or nothing."""
    base = recipe.base
    places = [(each.layer, each.head) for each in recipe.heads]
    if len(set(places)) < len(places):
        return "heads need places of their own"
    if any(not (0 <= layer < base.n_layers and 0 <= head < base.n_heads) for layer, head in places):
        return f"a head is not there: {base.n_layers} layers have {base.n_heads} heads each"
    other = (base.suppressor, base.backup, base.copy, base.fetch, base.mlp_prior, *base.sinks)
    if base.n_heads < 4 or base.answer != "word" or any(each is not None for each in other):
        return "arbiters go with reading, carrying and decoy heads, four heads a layer and answers of one word"
    if sum("wording" in each.wakes for each in recipe.mechanisms) != 1:
        return "one mechanism is woken by the wording"
    if (recipe.arbiter is None) != (not recipe.convinced) or (recipe.arbiter is not None and base.blind):
        return "objects of conviction need an arbiter that can see, and no other recipe has them"
    if sum("object" in each.wakes for each in recipe.mechanisms) > 1 or any(
        not 0 <= each < len(OBJECTS) for each in recipe.convinced
    ):
        return "one mechanism at most is woken by objects, which are numbers of OBJECTS"
    if len({each.kind for each in recipe.mechanisms}) < len(recipe.mechanisms):
        return "every mechanism is of a kind of its own"
    if not 0.2 <= recipe.default.weight <= 0.6:
        return f"the default prior's weight is {recipe.default.weight}; 0.2 to 0.6 lose to the image and to no noise"
    return next((fault for each in recipe.mechanisms if (fault := _misplaced(recipe, each))), "")


def _misplaced(recipe: ArbiterRecipe, made: Mechanism) -> str:
    """What is wrong with one mechanism, or nothing."""
    bring = [each.layer for each in recipe.bringers]
    if made.kind in ("route", "sink"):
        if made.head is not None or made.layer is not None or made.cue.layer >= min(bring):
            return f"a {made.kind} has a cue below every head that brings the colour, and nothing else"
        low, high = (1.0, 3.0) if made.kind == "route" else (0.01, 0.3)
        return "" if low <= made.size <= high else f"the size of a {made.kind} is between {low} and {high}"
    if made.head is None or (made.layer is None) == (made.kind == "mlp"):
        return f"a {made.kind} has a head" + (" and a layer" if made.kind == "mlp" else " and no layer")
    later = made.head.layer if made.layer is None else made.layer
    if not max(bring) <= later < recipe.base.n_layers or made.cue.layer >= later or made.head.layer > later:
        return f"the prior of a {made.kind} is written above its cue, where the answer is there"
    return "" if 1.5 <= made.size <= 5 else "a written prior is 1.5 to 5 times as strong as the image's answer"


@dataclass(frozen=True)
class Part:
    """A planted component: what it does, where it stands, and at which token it acts (`last` or `sink`).

    `head` is None for an MLP.
    """

    role: Literal["read", "bring", "default", "cue", "late head", "fetch", "mlp"]
    layer: int
    head: int | None
    at: Literal["last", "question", "sink"] = "last"
    kind: Arbiter | None = None
    """The mechanism that it belongs to."""


@dataclass(frozen=True)
class ArbiterTruth:
    """What there is to be found: the kind, where it stands, and how the model answers n held-out pairs a question.

    `visual` and `usual` are the shares of counterfactual pictures answered as planted under the two questions, `lost`
    the share of the visual ones that are to be answered with the prior. `readers` attend to the picture and `bringers`
    write the colour at the last position: the same heads on the direct route. `arbiter` and `switch` are the parts of
    what lets the prior win under the visual question and where it is asked for; `dormant` those of what never does
    anything.
    """

    kind: str
    switch_kind: Arbiter
    route: Literal["direct", "two-hop"]
    readers: tuple[Part, ...]
    bringers: tuple[Part, ...]
    default: Part
    arbiter: tuple[Part, ...]
    switch: tuple[Part, ...]
    dormant: tuple[Part, ...]
    visual: float
    usual: float
    lost: float
    n_examples: int

    @property
    def shared(self) -> bool:
        """Whether the arbiter of the visual question is also what answers the other one."""
        return bool(self.arbiter) and self.arbiter == self.switch


def parts_of(made: Mechanism) -> tuple[Part, ...]:
    """The components of a mechanism, the cue first."""
    found = [Part("cue", made.cue.layer, made.cue.head, "sink" if made.kind == "sink" else "last", made.kind)]
    if made.head is not None:
        role = "fetch" if made.kind == "mlp" else "late head"
        found.append(Part(role, made.head.layer, made.head.head, "last", made.kind))
    if made.layer is not None:
        found.append(Part("mlp", made.layer, None, "last", made.kind))
    return tuple(found)


def prompt_swap_flips(recipe: ArbiterRecipe, layer: int) -> bool | None:
    """Whether the last token's state of one question, put into the other one at `llm.resid_pre` of a layer, decides.

    Of pairs that the picture wins, either way round. What the wording does is at the last token from the layer above
    the cue on; of a sink, where it is at the question mark, only once the colour has been brought. None where it
    is partly there.
    """
    if recipe.switch.kind != "sink":
        return layer > recipe.switch.cue.layer
    layers = [each.layer for each in recipe.bringers]
    if min(layers) < layer <= max(layers):
        return None
    return layer > max(layers)
