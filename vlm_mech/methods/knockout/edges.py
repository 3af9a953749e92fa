"""Attention edges between named groups of tokens: `last<-image` is the last token attending to the image.

Groups are given as numbers of tokens (padding left out), so that they mean the same in every batch.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from vlm_mech.data.counterfactual_scenes import sample_pairs
from vlm_mech.data.pair_folder import pair_fields
from vlm_mech.data.render import masks
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.span import LLM_SPANS, Each, Patches, Span, Tokens, Words
from vlm_mech.sweeps.recorded_pass import RecordedPass, record

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs
    from vlm_mech.models.vlm import VLM

ARROW = "<-"
OF_OBJECT = ("object", "rest")
ANSWER = "answer"
GROUPS = (*LLM_SPANS, "after", *OF_OBJECT)
FORMS = f"{', '.join(GROUPS)}, words:TEXT or patches:ROW.COLUMN,ROW.COLUMN; several joined by +"

DRAWS = 100
"""How often a control is drawn at most."""

NO_OBJECT = "no object is given"
NOT_SEEN = "no image token shows the object"
NO_REST = "every image token shows the object"
NO_REST_OF_TEXT = "nothing but the subject comes before the last token"
FUTURE = "attention allows none of its edges, because every key comes after the queries"
OUT_OF_REACH = "attention allows none of its edges, because every key is beyond the model's attention window"
NOTHING_GIVEN = "the answer is one token, which nothing follows"
NO_CONTROL = "there are too few other edges for a control of equal size"


@dataclass(frozen=True)
class Edge:
    """Attention from the tokens of `query` to those of `key`, both groups by name."""

    query: str
    key: str

    def __str__(self) -> str:
        return f"{self.query}{ARROW}{self.key}"

    @property
    def of_answer(self) -> bool:
        """Whether the answer's own tokens, which follow the prompt, are among the queries."""
        return ANSWER in self.query.split("+")

    @property
    def of_prompt(self) -> str:
        """The queries within the prompt; empty where there are none."""
        return "+".join(name for name in self.query.split("+") if name != ANSWER)

    @property
    def of_object(self) -> bool:
        """Whether it depends on which patches show the object, and so may be missing in single examples."""
        return bool({*self.query.split("+"), *self.key.split("+")} & {*OF_OBJECT})


@dataclass(frozen=True)
class Ends:
    """Both ends of an edge in one example, as numbers of its tokens.

    `answer`: the answer's own tokens, which have no number in the prompt, are queries too.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]
    answer: bool = False


def parse_edge(text: str) -> Edge:
    """The edge that `QUERY<-KEY` names.

    Raises:
        UsageError: no arrow, or a group that is not known.
    """
    query, arrow, key = (part.strip() for part in text.partition(ARROW))
    if not arrow or not query or not key:
        raise UsageError(f"edge {text!r} is not of the form QUERY<-KEY, such as last<-image")
    for part in (*query.split("+"), *key.split("+")):
        if part not in GROUPS and not part.startswith(("words:", "patches:")):
            raise UsageError(f"edge {text!r} names the group {part!r}; known are {FORMS}")
    if ANSWER in key.split("+"):
        raise UsageError(f"edge {text!r}: the answer's own tokens can be queries, not keys")
    return Edge(query, key)


def visible_edges(clean: RecordedPass, example: int) -> Bool[np.ndarray, "token token"]:
    """Which tokens of an example may attend to which, in any layer and head; padding left out."""
    n_pos = clean.encoded.n_pos
    present = list(clean.encoded.rows[example].present)
    total = np.zeros((n_pos, n_pos), dtype=bool)
    masks = {id(block.mask): block for block in clean.blocks}
    for block in masks.values():
        allowed = block.allowed(0, n_pos)
        total |= allowed[example if allowed.shape[0] > 1 else 0].any(0).cpu().numpy()
    return total[np.ix_(present, present)]


def layers_with(clean: RecordedPass, example: int, parts: Sequence[Ends]) -> frozenset[int]:
    """The layers whose attention allows an edge of some part; those with a sliding window see near tokens only."""
    everywhere = frozenset(range(len(clean.blocks)))
    if len({id(block.mask) for block in clean.blocks}) == 1:
        return everywhere
    present, seeing = np.array(clean.encoded.rows[example].present), {}
    for block in clean.blocks:
        if id(block.mask) not in seeing:
            allowed = block.allowed(0, clean.encoded.n_pos)
            visible = allowed[example if allowed.shape[0] > 1 else 0].any(0).cpu().numpy()
            seeing[id(block.mask)] = any(
                # What follows the prompt sees at most as far back as its last token.
                visible[np.ix_(present[list(part.query) or [-1]], present[list(part.key)])].any()
                for part in parts
            )
    return frozenset(layer for layer in everywhere if seeing[id(clean.blocks[layer].mask)])


def ends_of(
    encoded: Encoded,
    example: int,
    edge: Edge,
    visible: Bool[np.ndarray, "token token"],
    shows: Bool[np.ndarray, "height width"] | None = None,
) -> Ends | str:
    """Both ends of an edge in one example, or why this example has no such edge.

    Args:
        visible: what may attend to what (see `visible_edges`).
        shows: pixels of the object in the example's image.

    Raises:
        UsageError: a group is empty, both share some tokens but not all, a mask of another size, or an edge (of
            groups that do not depend on the object) that attention does not allow.
    """
    found = [_group(encoded, example, name, shows) if name else [] for name in (edge.of_prompt, edge.key)]
    for group in found:
        if isinstance(group, str):
            return group
    query, key = (tuple(group) for group in found if not isinstance(group, str))
    if not query:
        return Ends((), key, answer=True)
    shared = set(query) & set(key)
    if shared and query != key:
        raise UsageError(
            f"{edge}: both groups hold {len(shared)} token(s) in common; name groups that share nothing, or one twice"
        )
    if not visible[np.ix_(query, key)].any():
        reason = FUTURE if key[0] > query[-1] else OUT_OF_REACH
        if edge.of_object:
            return reason
        hint = f"; is {edge.key}{ARROW}{edge.query} meant?" if reason == FUTURE else ""
        raise UsageError(f"{edge}: {reason}{hint}")
    return Ends(query, key, edge.of_answer)


@dataclass(frozen=True)
class Cut:
    """Both ends of an edge in some examples, and the layers in which all of them have it; None where that is all."""

    query: Span
    key: Span
    layers: frozenset[int] | None = None


def cut_of(
    vlm: "VLM", pairs: "Pairs", edge: Edge, masks: Mapping[str, Bool[np.ndarray, "height width"]]
) -> "Cut | str":
    """An edge in each of some examples, those answered wrongly too, or why one of them does not have it.

    Edges from an answer's own tokens are of no prompt, and so of none.

    Args:
        masks: pixels of the object by pair, for the groups `object` and `rest`.

    Raises:
        UsageError: it does not fit (see `edges.ends_of`).
    """
    if edge.of_answer:
        return "tokens of answers are in no prompt"
    clean, parts, layers = record(vlm, vlm.encode(pairs.base)), [], None
    for number, pair in enumerate(pairs):
        ends = ends_of(clean.encoded, number, edge, visible_edges(clean, number), masks.get(pair.id))
        if isinstance(ends, str):
            return f"pair {pair.id} does not have the edge: {ends}"
        here = layers_with(clean, number, (ends,))
        layers = here if layers is None else layers & here
        parts.append(ends)
    query, key = (Each(tuple(Tokens(getattr(ends, end)) for ends in parts)) for end in ("query", "key"))
    return Cut(query, key, layers)


def control_of(
    ends: Ends,
    visible: Bool[np.ndarray, "token token"],
    random: np.random.Generator,
    *,
    n_answer: int = 0,
    spared: Collection[int] = (),
    sinks: Collection[int] = (),
) -> tuple[Ends, ...] | str:
    """As many edges as `ends` cuts, between random tokens, or why there are not so many.

    As many keys are drawn as the edge has, among all tokens; then queries outside the edge's own, until they attend to
    these keys by as many edges, the last query to a part of the keys; all is drawn anew, `DRAWS` times at most, when
    the queries do not suffice. Edges of a token to itself are not counted: with `keep_self` none is cut, so that no
    token is left with nothing to attend to.

    Args:
        n_answer: tokens of the answer that lose the edge too; as many edges more are drawn within the prompt.
        spared: numbers of tokens that are drawn as keys of no control, such as sinks.
        sinks: numbers of tokens of which as many are among the keys drawn as among the edge's own.

    Returns:
        One or two rectangles of edges.
    """
    wanted = int(visible[np.ix_(ends.query, ends.key)].sum()) if ends.query else 0
    wanted += n_answer * len(ends.key)
    if not wanted:
        return NOTHING_GIVEN
    tokens = np.setdiff1d(np.arange(len(visible)), [*spared, *sinks]) if spared or sinks else np.arange(len(visible))
    n_sinks = len({*ends.key} & {*sinks})
    if len(tokens) < len(ends.key) - n_sinks:
        return NO_CONTROL
    for _ in range(DRAWS):
        key = np.sort(random.choice(tokens, len(ends.key) - n_sinks, replace=False))
        if n_sinks:
            key = np.sort(np.concatenate([key, random.choice(sorted(sinks), n_sinks, replace=False)]))
        queries = random.permutation(np.setdiff1d(np.arange(len(visible)), ends.query))
        found = _rectangles(key, queries, wanted, visible, random)
        if found:
            return found
    return NO_CONTROL


def _rectangles(
    key: Int[np.ndarray, "key"],
    queries: Int[np.ndarray, "query"],
    wanted: int,
    visible: Bool[np.ndarray, "token token"],
    random: np.random.Generator,
) -> tuple[Ends, ...]:
    """Exactly `wanted` edges from these queries, in order, to these keys; nothing if there are fewer."""
    whole: list[int] = []
    for query in queries.tolist():
        open_keys = key[visible[query, key] & (key != query)]
        if len(open_keys) > wanted:
            part = Ends((query,), tuple(np.sort(random.choice(open_keys, wanted, replace=False)).tolist()))
            return (Ends(tuple(sorted(whole)), tuple(key.tolist())), part) if whole else (part,)
        if len(open_keys):
            whole.append(query)
            wanted -= len(open_keys)
        if not wanted:
            return (Ends(tuple(sorted(whole)), tuple(key.tolist())),)
    return ()


def _group(
    encoded: Encoded, example: int, names: str, shows: Bool[np.ndarray, "height width"] | None
) -> list[int] | str:
    """Sorted numbers of the tokens of a group, or why this example has none."""
    positions: set[int] = set()
    for name in names.split("+"):
        found = _positions(encoded, example, name, shows)
        if isinstance(found, str):
            return found
        positions |= set(found)
    number = {position: index for index, position in enumerate(encoded.rows[example].present)}
    return sorted(number[position] for position in positions)


def _positions(
    encoded: Encoded, example: int, name: str, shows: Bool[np.ndarray, "height width"] | None
) -> Sequence[int] | str:
    if name == "rest" and encoded.rows[example].subject is not None:
        return encoded.rows[example].beside_subject or NO_REST_OF_TEXT
    if name in OF_OBJECT:
        return _of_object(encoded, example, name, shows)
    if name == "after":
        row = encoded.rows[example]
        end = max(row.image, default=len(row.tokens))
        found = [position for position in row.present if position > end]
        if not found:
            raise UsageError(f"group 'after' is empty in example {example}: no token comes after an image")
        return found
    return encoded.positions(_span(name), example)


def _span(name: str) -> Span:
    kind, _, value = name.partition(":")
    if kind == "words":
        return Words(value)
    if kind != "patches":
        return name
    try:
        cells = [tuple(int(number) for number in cell.split(".")) for cell in value.split(",")]
        return Patches(tuple((row, column) for row, column in cells))
    except ValueError:
        raise UsageError(f"group {name!r} is not of the form patches:ROW.COLUMN,ROW.COLUMN") from None


def _of_object(
    encoded: Encoded, example: int, name: str, shows: Bool[np.ndarray, "height width"] | None
) -> Sequence[int] | str:
    if shows is None:
        return NO_OBJECT
    inside = object_positions(encoded, example, shows)
    if not inside:
        return NOT_SEEN
    outside = [position for position in encoded.positions("image", example) if position not in inside]
    if name == "object":
        return sorted(inside)
    return outside or NO_REST


def object_positions(encoded: Encoded, example: int, shows: Bool[np.ndarray, "height width"]) -> set[int]:
    """Positions of the tokens of the first image, in all its views, whose pixels hold some of the object's.

    Raises:
        UsageError: the mask has another size than the image, or the image tokens are no patches.
    """
    picture = encoded.rows[example].images[0]
    if shows.shape != picture.size[::-1]:
        height, width = shows.shape
        raise UsageError(f"example {example}: a mask of {width} x {height} pixels for an image of {picture.size}")
    if not picture.layout.views:
        raise UsageError("the image tokens of this model are learned queries; object and rest cannot be told apart")
    found: set[int] = set()
    for number, view in enumerate(picture.layout.views):
        for slot, box in zip(view.slots, encoded.boxes(example, view=number), strict=True):
            left, top, right, bottom = (round(edge) for edge in (box.left, box.top, box.right, box.bottom))
            if shows[top:bottom, left:right].any():
                found.add(picture.positions[slot])
    return found


def object_masks(pairs: "Pairs", *, seed: int, split: str) -> dict[str, Bool[np.ndarray, "height width"]]:
    """Pixels of what each question is about, by pair: from the scenes, or from a folder's `object` boxes.

    A line of `pairs.jsonl` may hold `object`, a list of [left, top, right, bottom] in pixels of the image.

    Args:
        pairs: as `load_pairs` gave them, before any was taken out.
        seed, split: with which they were loaded.

    Raises:
        UsageError: a box that is none, or that is empty or outside the image, or of a prompt with several images.
    """
    if pairs.name.startswith("scenes/"):
        return _scene_masks(pairs, seed, split)
    known, found = {pair.id: pair for pair in pairs}, {}
    for name, fields in pair_fields(Path(pairs.name)).items():
        if name in known and "object" in fields:
            images = list(known[name].images)
            if len(images) > 1:
                raise UsageError(f"pair {name}: object is in pixels of one image, and the prompt shows {len(images)}")
            found[name] = _mask_of_boxes(name, fields["object"], load_image(images[0]).size)
    return found


def _scene_masks(pairs: "Pairs", seed: int, split: str) -> dict[str, Bool[np.ndarray, "height width"]]:
    found = {}
    for pair in sample_pairs(pairs.name.removeprefix("scenes/"), len(pairs), seed=seed, split=split):
        parts = masks(pair.scene)
        named = [shows for (number, _), shows in parts.items() if pair.scene.things[number].kind in pair.question.about]
        found[pair.scene.key[:12]] = np.any(named, axis=0)
    return found


def _mask_of_boxes(name: str, boxes: Any, size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    width, height = size
    shows = np.zeros((height, width), dtype=bool)
    for box in boxes if isinstance(boxes, list) else [boxes]:
        fits = isinstance(box, list) and len(box) == 4 and all(isinstance(edge, int | float) for edge in box)
        if not fits or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            raise UsageError(
                f"pair {name}: object {box!r} is not a box [left, top, right, bottom] within {width} x {height} pixels"
            )
        left, top, right, bottom = (round(edge) for edge in box)
        shows[top:bottom, left:right] = True
    return shows
