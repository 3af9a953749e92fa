"""Counterfactual pairs (`Pair`) as a data set: of generated scenes, of a folder of the user's own, of rows in memory.

What is made of such a data set (parts, pairs turned) is in `data.derived_pairs`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from PIL import Image

from vlm_mech.data.collection import check_parts, described, row_of
from vlm_mech.data.counterfactual_scenes import PAIR_SETS
from vlm_mech.data.fact_tables import RELATIONS
from vlm_mech.data.facts import fact_pairs, is_facts
from vlm_mech.data.given_rows import rows_given
from vlm_mech.data.pair import Made, Pair, with_own_groups
from vlm_mech.data.pair_folder import FILE, pairs_of
from vlm_mech.data.readers.format import ReaderOptions
from vlm_mech.data.readers.registry import names_of_formats
from vlm_mech.data.scene_pairs import scene_pairs
from vlm_mech.data.scenes import check_split
from vlm_mech.data.shared_pictures import linked_groups
from vlm_mech.data.sources import find_data, what_is_there
from vlm_mech.data.user_files import Drawn, Refused, check_count
from vlm_mech.errors import UsageError
from vlm_mech.inputs.answer import Spelling, Variants
from vlm_mech.inputs.as_html import N_SHOWN, escaped, picture, tabled, titled
from vlm_mech.inputs.image import load_image, side_by_side
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.wording import BARE, Wording

Direction = Literal["noising", "denoising"]
DIRECTIONS: tuple[Direction, ...] = ("noising", "denoising")
"""Noising puts states of the counterfactual into the run on the image, denoising the reverse."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Counterfactual pairs of one data set; `refused` lists those that could not be used.

    `spelling` is how a model would begin the answers, once that is known; `answer` and `counterfactual_answer` are
    written so, while each pair keeps its own.
    """

    name: str
    pairs: tuple[Pair, ...]
    refused: tuple[Refused, ...] = ()
    spelling: Spelling | None = None
    told: dict[str, float] = dataclasses.field(default_factory=dict)
    """Mean probability of the correct answers by spelling, where several were possible."""
    chosen_on: str = ""
    """What the spelling was chosen on, where several were possible."""
    variants: tuple[Spelling, ...] = ()
    """Spellings the likeliest of which counts each time, in place of one."""
    wins: dict[str, float] = dataclasses.field(default_factory=dict)
    """The share of correct answers of which each of these is the likeliest; `chosen_on` says of which answers."""
    drawn: str = ""
    """How the pairs were drawn from a larger number of the user's."""
    notes: tuple[str, ...] = ()
    """What is to be told of the data, such as known label errors."""

    def __post_init__(self) -> None:
        check_parts(self, pairs=Pair, refused=Refused)
        object.__setattr__(self, "pairs", with_own_groups(self.pairs))

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Any],
        *,
        name: str = "rows",
        folder: str | Path = ".",
        n: int | None = None,
        seed: int = 0,
        wording: Wording = BARE,
    ) -> "Pairs":
        """Pairs of rows in memory, with the fields of a line of `pairs.jsonl` (docs/data.md).

        Rows are a list of dicts, a pandas DataFrame, a `datasets.Dataset` (streaming too) or any iterable of dicts;
        pictures PIL images, arrays, bytes, base64, paths, addresses or the hub's mappings. Only rows that are drawn
        are fetched, and only their pictures opened.

        Args:
            name: what the data are called in results.
            folder: from which paths of pictures go out.
            n: number of pairs, drawn with the seed; of an iterable without a length the first n that can be used.
            seed: draws them.
            wording: how their questions are put.

        Raises:
            UsageError: no rows, or none that can be used.
        """
        if n is not None:
            check_count(n, "n", "pair")
        found = rows_given(rows, "Pairs.from_rows")
        drawn = pairs_of(found, Path(folder), name, n=n, seed=seed)
        pairs = cls(name, drawn.used, drawn.refused, drawn=drawn.told, notes=drawn.notes)
        return linked(pairs if wording == BARE else pairs.worded(wording))

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        return f"Pairs({self.name!r}: {len(self)} pairs, {len(self.refused)} refused)"

    def _repr_html_(self) -> str:
        rows = [
            (
                escaped(pair.id),
                escaped(pair.question),
                "".join(picture(each, pair.answer) for each in pair.images),
                "".join(picture(each, pair.counterfactual_answer) for each in pair.counterfactual_images),
            )
            for pair in self.pairs[:N_SHOWN]
        ]
        told = f"{self.name}: {len(self)} pairs, {len(self.refused)} refused"
        head = ("pair", "question", "image", "counterfactual")
        return titled("Pairs", told, tabled(head, rows, n_more=len(self) - N_SHOWN))

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, rows: int) -> Pair: ...

    @overload
    def __getitem__(self, rows: slice) -> "Pairs": ...

    def __getitem__(self, rows: int | slice) -> "Pair | Pairs":
        """One pair by its number, or some of them as `Pairs`."""
        if isinstance(rows, slice):
            return dataclasses.replace(self, pairs=self.pairs[rows])
        return row_of(self.pairs, rows, "pairs")

    @property
    def base(self) -> list[Prompt]:
        """The question about each image."""
        return [pair.base for pair in self.pairs]

    @property
    def counterfactual(self) -> list[Prompt]:
        """The question about each counterfactual image."""
        return [pair.counterfactual for pair in self.pairs]

    @property
    def answer(self) -> list[str]:
        """Right answers for the images."""
        return [self.written(pair.answer) for pair in self.pairs]

    @property
    def counterfactual_answer(self) -> list[str]:
        """Right answers for the counterfactual images."""
        return [self.written(pair.counterfactual_answer) for pair in self.pairs]

    def worded(self, wording: Wording) -> "Pairs":
        """The same pairs with their questions worded differently."""
        return dataclasses.replace(self, pairs=tuple(dataclasses.replace(pair, wording=wording) for pair in self.pairs))

    def written(self, answer: str) -> str:
        """An answer in the spelling of the pairs, or in all of them."""
        if self.variants:
            return Variants([each.of(answer) for each in self.variants])
        return answer if self.spelling is None else self.spelling.of(answer)

    @property
    def digest(self) -> str:
        """A hash of every pixel, question, wording and answer."""
        found = hashlib.sha256()
        for pair in self.pairs:
            for image in pair.pictures if pair.made == "other" else pair.own_pictures:
                loaded = load_image(image)
                found.update(repr(loaded.size).encode() + loaded.tobytes())
            said: list[Any] = [pair.id, pair.question, pair.answer, pair.counterfactual_answer]
            said += [pair.made, list(pair.options)] if pair.made else []
            said += [pair.counterfactual_question, pair.subjects, pair.completion] if pair.is_text else []
            said += [pair.wording.told] if pair.wording.told else []
            found.update(json.dumps(said).encode())
        return found.hexdigest()[:16]

    @property
    def described(self) -> dict[str, Any]:
        """What the provenance of a run says of its data."""
        told = described(self, (pair.wording for pair in self.pairs))
        told |= {"texts": True} if self.is_text else {}
        return told | ({"counterfactual": self.made} if self.made else {})

    @property
    def is_text(self) -> bool:
        """Whether they are pairs of two questions, without images."""
        return bool(self.pairs) and all(pair.is_text for pair in self.pairs)

    @property
    def made(self) -> Made | None:
        """How the counterfactual pictures of single items were made; None for pairs."""
        return self.pairs[0].made if self.pairs else None


def check_pairs(given: Any, call: str) -> None:
    """Raises `UsageError` unless pairs are given, one at least.

    Args:
        call: that they are given to, for the error.
    """
    if not isinstance(given, Pairs):
        raise UsageError(
            f"{call} takes Pairs, not a {type(given).__name__}; load_pairs(name or folder) gives some, or Pairs(name, "
            "[Pair(...), ...])"
        )
    if not len(given):
        raise UsageError(f"{call}: no pairs were given ({given.name!r:.60} is empty); at least one is needed")


def load_pairs(
    name_or_folder: str | Path | Iterable[Any],
    *,
    n: int | None = None,
    seed: int = 0,
    split: str = "test",
    wording: Wording = BARE,
    fix_labels: bool = False,
) -> Pairs:
    """Pairs by name (`scenes/colour`, `facts/capitals`, ...), from a folder with `pairs.jsonl`, or of a format.

    `mmvp:FOLDER` names a format (docs/data.md); a folder alone is known by its files. Pairs of a folder that share a
    picture are one group, whatever the folder says: they are no independent examples.

    Args:
        name_or_folder: a name, a folder or its `pairs.jsonl`; or rows in memory (dicts, a DataFrame, a data set of the
            hub), of which `Pairs.from_rows` makes pairs.
        n: number of pairs: 64 scenes by default; all of a folder, or n drawn from it, which keep their order; of facts
            the first n, by default each two subjects once.
        seed: draws the scenes, or the pairs of a folder.
        split: `train`, `validation` or `test` scenes; the embedded models were trained on `train` alone.
        wording: how their questions are put (`Pairs.worded` changes it).
        fix_labels: correct label errors that are known; they are listed in `notes` either way.

    Raises:
        UsageError: an unknown name, a folder of no format or of items alone, or one without a pair that can be used.
    """
    if n is not None:
        check_count(n, "n", "pair")
    check_split(split)
    if not isinstance(name_or_folder, str | Path):
        if isinstance(name_or_folder, Pairs):
            raise UsageError("load_pairs is given Pairs, which need no loading; pairs[:8] are the first of them")
        return Pairs.from_rows(name_or_folder, n=n, seed=seed, wording=wording)
    if str(name_or_folder).startswith("scenes/"):
        name = str(name_or_folder)
        return Pairs(name, scene_pairs(name, 64 if n is None else n, seed, split, wording))
    if is_facts(str(name_or_folder)):
        return Pairs(str(name_or_folder), fact_pairs(str(name_or_folder), n, seed, split, wording))
    drawn = _read(name_or_folder, n, seed, fix_labels)
    name = str(Path(name_or_folder))
    pairs = Pairs(name, drawn.used, drawn.refused, drawn=drawn.told, notes=drawn.notes)
    return linked(pairs if wording == BARE else pairs.worded(wording))


def _read(name_or_folder: str | Path, n: int | None, seed: int, fix_labels: bool) -> Drawn[Pair]:
    """The pairs of a folder with `pairs.jsonl` or of a format."""
    found = find_data(name_or_folder)
    if found is not None and found.holds != "pairs":
        raise UsageError(f"data {str(name_or_folder)!r} holds items ({found.kind}), single images; pairs are needed")
    if found is None:
        names = ", ".join(
            (*(f"scenes/{name}" for name in PAIR_SETS), "facts", *(f"facts/{name}" for name in RELATIONS))
        )
        raise UsageError(
            f"data {str(name_or_folder)!r} is neither a folder with {FILE} nor one of {names} nor of a known format, "
            f"as in mmvp:FOLDER ({names_of_formats()}){what_is_there(name_or_folder)}"
        )
    rows = found.rows(ReaderOptions(fix_labels, seed))
    return pairs_of(rows, found.folder, found.place, n=n, seed=seed, keep_pixels=found.is_own)


def linked(pairs: Pairs) -> Pairs:
    """The pairs, those that share a picture of the same pixels in one group, however they are linked over others."""
    groups = linked_groups([pair.group or pair.id for pair in pairs], [pair.shown for pair in pairs])
    # The first of several says its group too: one without a group is no part of a group that has its id.
    changed = [
        pair if group in (None, pair.group) else dataclasses.replace(pair, group=group)
        for pair, group in zip(pairs, groups, strict=True)
    ]
    return dataclasses.replace(pairs, pairs=tuple(changed))


def pictures(pairs: Pairs, *, n: int = 4) -> tuple[tuple[str, Image.Image], ...]:
    """Both images of some pairs, with question and answer; several of one prompt stand side by side."""
    shown = []
    for pair in [each for each in pairs if not each.is_text][:n]:
        shown.append((f"{pair.question} {pair.answer}", side_by_side(pair.images)))
        if pair.made != "none":
            said = pair.counterfactual_answer if pair.made is None else f"counterfactual image ({pair.made})"
            shown.append((f"{pair.question} {said}", side_by_side(pair.counterfactual_images)))
    return tuple(shown)
