"""What the examples of a data set are called in what is said of them: pairs, of scenes or not, or single items."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs


@dataclasses.dataclass(frozen=True)
class Nouns:
    """The words for the examples of a data set; `put` fills a text with them."""

    one: str
    many: str
    shown: str
    """The pictures that a question is asked about."""
    others: str
    """Those of another example, which give the floor."""
    units: str
    """What examples that are no independent ones belong to, over which intervals are taken."""
    sides: str = "images"
    """What a pair has two of, each with an answer of its own."""

    def put(self, text: str) -> str:
        """The text with `{one}`, `{many}`, `{shown}`, `{others}` and `{units}` filled in."""
        return text.format(**dataclasses.asdict(self))


PAIRS = Nouns("pair", "pairs", "both images of a pair", "another pair's images", "pairs")
SCENES = dataclasses.replace(PAIRS, units="scenes")
TEXTS = dataclasses.replace(PAIRS, shown="both questions", others="another pair's questions", sides="questions")
ITEMS = Nouns("item", "items", "an item's image", "another item's image", "items")


def nouns_of(pairs: "Pairs") -> Nouns:
    """The words for the examples of a data set: of generated scenes, of other pairs, or of single items."""
    return _nouns(pairs.name, pairs.made, pairs.is_text)


def nouns_in(provenance: Mapping[str, Any]) -> Nouns:
    """The words for the examples of a run, from what its provenance says of its data (of several the first)."""
    told = provenance.get("data", {})
    told = told[0] if isinstance(told, list) else told
    return _nouns(told.get("name", ""), told.get("counterfactual"), bool(told.get("texts")))


def _nouns(name: str, made: str | None, texts: bool) -> Nouns:
    if made is not None:
        return ITEMS
    if texts:
        return TEXTS
    return SCENES if name.startswith("scenes/") else PAIRS
