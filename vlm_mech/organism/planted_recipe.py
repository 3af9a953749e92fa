"""Planted models as data: what is planted (`Recipe`), and what every method must therefore find (`Truth`).

Recipes are drawn at random in `planted_draw.py`; the weights that follow from one are made in `planted_weights.py` and
`planted_units.py`, the models and their examples in `planted.py`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from vlm_mech.errors import UsageError

COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
OBJECTS = ("car", "ball", "cup", "kite", "leaf", "fish")
HEAD_SIZE = 16
HALVES, PLACES = ("pure", "mixed"), ("first", "second", "third")
"""The two pieces of a colour's name: which half of `COLOURS` it is in, and where there."""
ARTICLE = "a"

Answer = Literal["word", "pieces", "article"]
ANSWERS: tuple[Answer, ...] = ("word", "pieces", "article")
STORES = ("spare", "carrier")
"""Subspaces in which backups keep what they have read until it is needed."""

Role = Literal["read", "carry", "suppress", "backup", "decoy", "copy", "fetch", "sink"]
UnitRole = Literal["backup", "suppress", "dormant"]


@dataclass(frozen=True)
class Head:
    """A planted attention head; `weight` is its share among the heads of its kind.

    The weight of a reading head is its *planted read weight*: the share of the logit difference between the two
    pictures' answers that the head writes at the last position, attention patterns and norms held as they are. On the
    two-hop route the reading heads write at the question and their weight is the share that passes through them; the
    carrying heads write at the last position and have weights of their own. Both sets sum to one.
    """

    layer: int
    head: int
    weight: float = 1.0


@dataclass(frozen=True)
class Neurons:
    """MLP units planted together at one layer; `weight` is how strongly they write, relative to the picture."""

    layer: int
    weight: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a planted model; the same recipe gives the same weights.

    `reads` attend from the last position to the coloured patches and write their colour as the answer (direct route),
    or attend from the question's object and write the colour there, whence `carries` take it to the last position
    (two-hop route). `suppressor` attends from the last position to the object and writes the answer that goes with it
    by `priors` (an index into `COLOURS` for each of `OBJECTS`), `suppressor.weight` times as strongly as the picture's.
    `decoys` attend like the reading heads of the direct route and write nothing, or, times `decoy_gain`, a random map
    of the picture's texture, which has nothing to do with its colour. `backup` reads too, but its writing reaches the
    answer only where that is still empty; `second_backup` is one more above it, for where both are gone. In a `blind`
    recipe every head that reads pictures takes its value from a subspace that no picture touches: the matched null.

    `n_cells` patches carry the colour; `superposed` colours have directions that are not orthogonal; `jitter` is the
    largest deviation of a patch's mean from its colour, `texture` the largest contrast within patches (pixel values
    from -1 to 1). `noise` is the size of whatever is not planted, relative to what is. With `rotated` no direction lies
    along an axis. `target`: the decoys' noise is raised until this share of examples is answered correctly.

    Traps, whose mechanism some methods must miss or misread. `dormant` units put another colour in the answer's place,
    times their weight, where the answer and the copy of the colour that the head `copy` keeps at the last position are
    not the same. In runs without edits they always are, so that neither the units nor the copy do anything; they wake
    where one of the two is exchanged or averaged, and not where one is removed. `mlp_prior` units write a prior at the
    last position as a suppressor does: that of the object which the head `fetch` brings there, or, without that head,
    one for all objects (`priors` are then all the same), which comes from no other token. `sinks` attend from every
    token to that of one patch, the same in all pictures, and write nothing.

    `answer`: the colour as one `word`, one token ("red"); as two `pieces`, of which the first says one half of the
    colours and the second which one in it ("pure first"), both read from the picture by the same heads, once at the
    last position and once at the first piece; or after an `article` that all answers share ("a red"), where whatever
    attends from the last position attends from the article instead.
    """

    seed: int
    n_layers: int
    reads: tuple[Head, ...]
    carries: tuple[Head, ...] = ()
    suppressor: Head | None = None
    backup: Head | None = None
    second_backup: Head | None = None
    copy: Head | None = None
    dormant: Neurons | None = None
    fetch: Head | None = None
    mlp_prior: Neurons | None = None
    sinks: tuple[Head, ...] = ()
    decoys: tuple[Head, ...] = ()
    decoy_gain: float = 0.0
    blind: bool = False
    n_heads: int = 4
    n_cells: int = 1
    superposed: bool = False
    jitter: float = 0.0
    texture: float = 0.0
    noise: float = 1e-3
    rotated: bool = True
    target: float | None = None
    priors: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    answer: Answer = "word"

    def __post_init__(self) -> None:
        for each in self.heads:
            if not (0 <= each.layer < self.n_layers and 0 <= each.head < self.n_heads):
                raise UsageError(f"{each} is not there: {self.n_layers} layers have {self.n_heads} heads each")
        fault = _fault(self) or _trap_fault(self)
        if fault:
            raise UsageError(f"recipe {self.seed}: {fault}")

    @property
    def route(self) -> Literal["direct", "two-hop"]:
        """How the colour gets from the picture to the last position."""
        return "two-hop" if self.carries else "direct"

    @property
    def answers(self) -> tuple[str, ...]:
        """What is said of each of `COLOURS`."""
        if self.answer == "pieces":
            return tuple(f"{half} {place}" for half in HALVES for place in PLACES)
        return tuple(f"{ARTICLE} {colour}" for colour in COLOURS) if self.answer == "article" else COLOURS

    @property
    def heads(self) -> tuple[Head, ...]:
        """All planted heads."""
        alone = tuple(each for each in (self.suppressor, self.copy, self.fetch) if each is not None)
        return self.reads + self.carries + self.decoys + self.sinks + alone + self.backups

    @property
    def backups(self) -> tuple[Head, ...]:
        """The backups, in the order in which they stand in."""
        return tuple(each for each in (self.backup, self.second_backup) if each is not None)

    @property
    def d_model(self) -> int:
        """Width of the decoder's residual stream."""
        return HEAD_SIZE * self.n_heads


def _fault(recipe: Recipe) -> str:
    """What cannot be planted, or nothing."""
    if recipe.answer not in ANSWERS:
        return f"answer {recipe.answer!r} is not known; use one of {', '.join(ANSWERS)}"
    places = [(each.layer, each.head) for each in recipe.heads]
    if not recipe.reads or len(set(places)) < len(places):
        return "heads need places of their own, and one at least must read"
    written = [each.layer for each in recipe.carries or recipe.reads]
    if recipe.carries and max(each.layer for each in recipe.reads) >= min(written):
        return "every carrying head must be above every reading one"
    for name, later in (("suppressor", recipe.suppressor), ("backup", recipe.backup)):
        if later is not None and later.layer <= max(written):
            return f"the {name} is at layer {later.layer}; the answer is written up to layer {max(written)}"
    if recipe.backup is not None and (recipe.carries or recipe.superposed or recipe.suppressor):
        return "a backup goes with the direct route, orthogonal colours and no suppressor"
    for heads in (recipe.reads, recipe.carries):
        if heads and abs(sum(each.weight for each in heads) - 1) > 1e-6:
            return f"weights {[each.weight for each in heads]} do not sum to one"
    if not 0 < recipe.noise <= 0.1 or recipe.n_heads < 3 or not 1 <= recipe.n_cells <= 8:
        return "noise is in (0, 0.1] (parts that do nothing at all are refused), n_heads >= 3, n_cells in 1..8"
    if not 0 <= recipe.jitter <= 0.1 or not 0 <= recipe.texture <= 0.3:
        return "jitter is at most 0.1 and texture at most 0.3, so that no pixel is clipped"
    if recipe.target is not None and not (recipe.decoys and recipe.texture):
        return "a target accuracy needs decoys and a texture that they can write"
    return ""


def _trap_fault(recipe: Recipe) -> str:
    """What is wrong with the traps, or nothing."""
    dormant, prior, backup, second = recipe.dormant, recipe.mlp_prior, recipe.backup, recipe.second_backup
    for name, each in (("dormant path", dormant), ("MLP's prior", prior)):
        if each is not None and not 0 <= each.layer < recipe.n_layers:
            return f"the {name} is at layer {each.layer}; there are {recipe.n_layers} layers"
    if second is not None and (backup is None or second.layer <= backup.layer):
        return "a second backup goes above a first one"
    if sum(each is not None for each in (backup, dormant, prior, recipe.suppressor)) > 1:
        return "backup, suppressor, dormant path and an MLP's prior do not go together"
    if (dormant is None) != (recipe.copy is None) or (prior is None and recipe.fetch is not None):
        return "a dormant path and a copy belong together, and what is fetched is for an MLP's prior"
    if dormant is not None and recipe.copy is not None:
        if recipe.carries or recipe.superposed:
            return "a dormant path goes with the direct route and orthogonal colours"
        if dormant.layer < max(each.layer for each in (*recipe.reads, recipe.copy)):
            return f"the dormant path is at layer {dormant.layer}, below what it compares"
    if prior is not None:
        if prior.layer < max(each.layer for each in recipe.carries or recipe.reads):
            return f"the MLP's prior is at layer {prior.layer}, below where the answer is written"
        if recipe.fetch is not None and recipe.fetch.layer > prior.layer:
            return "the object is fetched above the MLP that needs it"
        if recipe.fetch is None and len(set(recipe.priors)) > 1:
            return "an MLP's prior without a head that fetches the object is the same for all objects"
    return ""


def matched_null(recipe: Recipe) -> Recipe:
    """The same model, except that no head gets anything from the picture."""
    return dataclasses.replace(recipe, blind=True, target=None)


@dataclass(frozen=True)
class Edge:
    """What a planted head does: it moves information from `key` to `query`, and likewise to every span of `also`.

    `query` is `last` (the prompt's last token, at which the answer's first token is said), `question`, or `answer` (the
    answer's tokens, at the first of which the second is said). An answer of two pieces is read twice, from `last` and
    from `answer`; after an article it is read from `answer` alone.

    `weight` is the share of the logit difference between the two pictures' answers that passes over this edge (see
    `Head`); of a suppressor, its strength relative to all reading heads. It is 0 for decoys, for a backup as long as
    the reading heads are there, and for reading heads that are blind.
    """

    role: Role
    query: str
    key: str
    layer: int
    head: int
    weight: float
    also: tuple[str, ...] = ()

    @property
    def queries(self) -> tuple[str, ...]:
        """Every span whose tokens attend over this edge."""
        return (self.query, *self.also)


@dataclass(frozen=True)
class Units:
    """What planted MLP units do at one layer; `numbers` are theirs in its hidden layer.

    `suppress` writes a prior, `weight` times as strongly as all reading heads write the answer. `dormant` and `backup`
    would write so strongly if they were awake; in runs without edits they never are.
    """

    role: UnitRole
    layer: int
    numbers: tuple[int, ...]
    weight: float


@dataclass(frozen=True)
class Truth:
    """What there is to be found in a planted model, and how well it answers.

    `units` are the MLP units that are planted. `says` is what the model answers: the `picture`'s colour, the `prior` of
    the object, or `nothing` (chance). `accuracy` is the share of `n_examples` prompts, none of which served to choose
    anything, so answered (in the null: the picture's colour).
    """

    edges: tuple[Edge, ...]
    says: Literal["picture", "prior", "nothing"]
    accuracy: float
    n_examples: int
    units: tuple[Units, ...] = ()

    def of(self, *roles: Role) -> tuple[Edge, ...]:
        """The edges with these roles."""
        return tuple(edge for edge in self.edges if edge.role in roles)

    @property
    def route(self) -> Literal["direct", "two-hop"]:
        """How the colour gets from the picture to the last position."""
        return "two-hop" if self.of("carry") else "direct"


def says(recipe: Recipe) -> Literal["picture", "prior", "nothing"]:
    """What a model of this recipe answers."""
    prior = recipe.suppressor or recipe.mlp_prior
    if prior is not None and (prior.weight > 1 or recipe.blind):
        return "prior"
    return "nothing" if recipe.blind else "picture"


def edges(recipe: Recipe) -> tuple[Edge, ...]:
    """Every planted head as an edge, with the weight to be found."""
    sees = 0.0 if recipe.blind else 1.0
    said = "answer" if recipe.answer == "article" else "last"
    also = ("answer",) if recipe.answer == "pieces" else ()
    read_at = ("question", ()) if recipe.carries else (said, also)

    def edge(role: Role, at: tuple[str, tuple[str, ...]], key: str, head: Head, weight: float) -> Edge:
        return Edge(role, at[0], key, head.layer, head.head, weight, at[1])

    found = [edge("read", read_at, "image", each, sees * each.weight) for each in recipe.reads]
    found += [edge("carry", (said, also), "question", each, sees * each.weight) for each in recipe.carries]
    found += [edge("decoy", (said, also), "image", each, 0.0) for each in recipe.decoys]
    if recipe.suppressor is not None:
        found.append(edge("suppress", (said, also), "question", recipe.suppressor, recipe.suppressor.weight))
    found += [edge("backup", (said, also), "image", each, 0.0) for each in recipe.backups]
    if recipe.copy is not None:
        found.append(edge("copy", (said, also), "image", recipe.copy, 0.0))
    if recipe.fetch is not None:
        found.append(edge("fetch", (said, also), "question", recipe.fetch, 0.0))
    found += [edge("sink", (said, also), "image", each, 0.0) for each in recipe.sinks]
    return tuple(found)


def units(recipe: Recipe) -> tuple[Units, ...]:
    """Every group of planted MLP units."""
    n_colours = len(COLOURS)
    found = [Units("backup", each.layer, tuple(range(n_colours)), 1.0) for each in recipe.backups]
    if recipe.mlp_prior is not None:
        n_units = 1 if recipe.fetch is None else n_colours
        found.append(Units("suppress", recipe.mlp_prior.layer, tuple(range(n_units)), recipe.mlp_prior.weight))
    if recipe.dormant is not None:
        n_units = n_colours * (n_colours - 1)
        found.append(Units("dormant", recipe.dormant.layer, tuple(range(n_units)), recipe.dormant.weight))
    return tuple(found)


def recovered(truth: Truth, span: str, layer: int) -> float:
    """The recovered fraction (`metrics.recovered`) to be found when `span` is swapped at `llm.resid_pre` of a layer.

    Exact in the limit of small norms and orthogonal colours, and of what natural states pass on: what a dormant path
    adds where a swap wakes it is not in it. A swap at the image counts the reading heads from that layer on, one at the
    last position those that wrote there before, one at the question what was read before it and is carried from it on.
    Of answers of two tokens it is the share of the whole answer (its log-probability minus that of the other one), and
    `last` stands for every position at which the answer is read (`Edge.queries`) at once.

    Raises:
        UsageError: the span is neither image, question nor last.
    """
    reads, carries = truth.of("read"), truth.of("carry")
    said = (carries or reads)[0].query
    if span not in ("image", "question", said):
        raise UsageError(f"span {span!r} has no known share; image, question or {said} has")
    if span == "image":
        return sum(edge.weight for edge in reads if edge.layer >= layer)
    if span == said:
        return sum(edge.weight for edge in carries or reads if edge.layer < layer)
    read = sum(edge.weight for edge in reads if edge.layer < layer)
    return read * sum(edge.weight for edge in carries if edge.layer >= layer)


def removed(truth: Truth, query: str, key: str, layer: int) -> float:
    """The share of the logit difference that is lost when `query` cannot attend to `key` at one layer.

    Of answers of two tokens it is lost when none of the edge's `queries` can.

    0 everywhere where a backup stands in: no layer is then necessary, though one is used.
    """
    if truth.of("backup"):
        return 0.0
    found = truth.of("read", "carry")
    return sum(edge.weight for edge in found if (edge.query, edge.key, edge.layer) == (query, key, layer))
