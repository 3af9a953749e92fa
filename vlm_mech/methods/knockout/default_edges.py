"""Which edges are cut where none is named: of pictures, or of texts about a subject."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from vlm_mech.data.pairs import Pairs
from vlm_mech.methods.knockout.edges import ANSWER, Edge

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

EDGES = ("after<-image", "question<-image", "last<-image", "last<-question", "last<-last")
OBJECT_EDGES = ("after<-object", "after<-rest")
TEXT_EDGES = ("last<-subject", "last<-rest", "last<-last")
"""Of texts, after Geva et al. 2023: from the subject, from all other tokens before the last one, and from itself."""
HEAD_EDGE, TEXT_HEAD_EDGE = "last<-image", "last<-subject"


def edges_where_none_is_named(
    vlm: "VLM", pairs: Pairs, masked: Collection[str], *, heads: bool = False
) -> tuple[str, ...]:
    """`EDGES`, without last<-question where both overlap, and `OBJECT_EDGES` where the object of every pair is known
    and image tokens are patches; of pairs of texts `TEXT_EDGES`.

    Args:
        masked: pairs of which it is known which pixels show their object.
        heads: the one edge that is cut head by head.
    """
    if heads:
        return (TEXT_HEAD_EDGE if pairs.is_text else HEAD_EDGE,)
    if pairs.is_text:
        return TEXT_EDGES
    encoded = vlm.encode(pairs[:1].base)
    # Where nothing follows the question, its last token is `last` itself.
    ends_there = set(encoded.positions("last")) <= set(encoded.positions("question"))
    edges = tuple(edge for edge in EDGES if edge != "last<-question" or not ends_there)
    known = {pair.id for pair in pairs} <= set(masked) and all(image.layout.views for image in encoded.rows[0].images)
    return (*edges, *OBJECT_EDGES) if known else edges


def with_answers(edge: Edge, during: str) -> Edge:
    """The edge, with the answer's tokens among its queries where these are to lose it too (`during` the answer)."""
    if (
        during == "prompt"
        or edge.of_answer
        or not {"last", "after"} & {*edge.query.split("+")}
        or edge.query == edge.key
    ):
        return edge
    return Edge(f"{edge.query}+{ANSWER}", edge.key)
