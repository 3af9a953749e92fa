"""Single items (`Item`) as a data set: of a folder of the user's own, or of an official format."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from vlm_mech.data.collection import check_parts, described, row_of
from vlm_mech.data.given_rows import rows_given
from vlm_mech.data.item import Item
from vlm_mech.data.item_folder import FILE, items_of
from vlm_mech.data.readers.format import ReaderOptions
from vlm_mech.data.readers.registry import names_of_formats
from vlm_mech.data.sources import find_data, what_is_there
from vlm_mech.data.user_files import Drawn, Refused, check_count
from vlm_mech.errors import UsageError
from vlm_mech.inputs.as_html import N_SHOWN, escaped, picture, tabled, titled
from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.wording import BARE, Wording


@dataclass(frozen=True, eq=False)
class Items:
    """Items of one data set; `refused` lists those that could not be used, `notes` what is to be told of the data."""

    name: str
    items: tuple[Item, ...]
    refused: tuple[Refused, ...] = ()
    drawn: str = ""
    """How the items were drawn from a larger number of the user's."""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_parts(self, items=Item, refused=Refused)

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
    ) -> "Items":
        """Items of rows in memory, with the fields of a line of `items.jsonl` (docs/data.md).

        Rows are a list of dicts, a pandas DataFrame, a `datasets.Dataset` (streaming too) or any iterable of dicts;
        pictures PIL images, arrays, bytes, base64, paths, addresses or the hub's mappings. Only rows that are drawn
        are fetched, and only their pictures opened.

        Args:
            name: what the data are called in results.
            folder: from which paths of pictures go out.
            n: number of items, drawn with the seed; of an iterable without a length the first n that can be used.
            seed: draws them.
            wording: how their questions are put.

        Raises:
            UsageError: no rows, or none that can be used.
        """
        if n is not None:
            check_count(n, "n", "item")
        found = rows_given(rows, "Items.from_rows")
        drawn = items_of(found, Path(folder), name, n=n, seed=seed)
        items = cls(name, drawn.used, drawn.refused, drawn.told, drawn.notes)
        return items if wording == BARE else items.worded(wording)

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"Items({self.name!r}: {len(self)} items, {len(self.refused)} refused)"

    def _repr_html_(self) -> str:
        rows = [
            (escaped(item.id), escaped(item.question), "".join(map(picture, item.images)), escaped(item.answer))
            for item in self.items[:N_SHOWN]
        ]
        told = f"{self.name}: {len(self)} items, {len(self.refused)} refused"
        return titled("Items", told, tabled(("item", "question", "image", "answer"), rows, n_more=len(self) - N_SHOWN))

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @overload
    def __getitem__(self, rows: int) -> Item: ...

    @overload
    def __getitem__(self, rows: slice) -> "Items": ...

    def __getitem__(self, rows: int | slice) -> "Item | Items":
        """One item by its number, or some of them as `Items`."""
        if isinstance(rows, slice):
            return dataclasses.replace(self, items=self.items[rows])
        return row_of(self.items, rows, "items")

    @property
    def prompts(self) -> list[Prompt]:
        """The question about each image."""
        return [item.prompt for item in self.items]

    @property
    def answer(self) -> list[str]:
        """The correct answers."""
        return [item.answer for item in self.items]

    def worded(self, wording: Wording) -> "Items":
        """The same items with their questions worded differently."""
        return dataclasses.replace(self, items=tuple(dataclasses.replace(item, wording=wording) for item in self.items))

    @property
    def digest(self) -> str:
        """A hash of every pixel, question, wording, answer and option."""
        found = hashlib.sha256()
        for item in self.items:
            for image in item.images:
                loaded = load_image(image)
                found.update(repr(loaded.size).encode() + loaded.tobytes())
            said: list[Any] = [item.id, item.question, item.answer, list(item.options)]
            said += [item.wording.told] if item.wording.told else []
            found.update(json.dumps(said).encode())
        return found.hexdigest()[:16]

    @property
    def described(self) -> dict[str, Any]:
        """What the provenance of a run says of its data."""
        return described(self, (item.wording for item in self.items))


def load_items(
    name_or_folder: str | Path,
    *,
    n: int | None = None,
    seed: int = 0,
    wording: Wording = BARE,
    fix_labels: bool = False,
) -> Items:
    """Items from a folder with `items.jsonl`, or of an official format.

    `pope:FOLDER` names a format (docs/data.md); a folder alone is known by its files. Items that share a picture are
    one group. Pictures stay in their files, but each is opened once, so that what cannot be read is refused.

    Args:
        n: number of items drawn, which keep their order; all by default.
        seed: draws them, and what an official protocol draws.
        wording: how their questions are put (`Items.worded` changes it).
        fix_labels: correct label errors that are known; they are listed in `notes` either way.

    Raises:
        UsageError: a folder of no format or of pairs alone, or one without an item that can be used.
    """
    if n is not None:
        check_count(n, "n", "item")
    drawn = _read(name_or_folder, n, seed, fix_labels)
    items = Items(str(Path(name_or_folder)), drawn.used, drawn.refused, drawn.told, drawn.notes)
    return items if wording == BARE else items.worded(wording)


def _read(name_or_folder: str | Path, n: int | None, seed: int, fix_labels: bool) -> Drawn[Item]:
    """The items of a folder with `items.jsonl` or of a format."""
    name, found = str(name_or_folder), find_data(name_or_folder)
    if found is not None and found.holds != "items":
        raise UsageError(f"data {name!r} holds pairs ({found.kind}); single items are needed")
    if found is None:
        raise UsageError(
            f"data {name!r} is neither a folder with {FILE} nor of a known format, as in pope:FOLDER "
            f"({names_of_formats()}){what_is_there(name_or_folder)}"
        )
    return items_of(found.rows(ReaderOptions(fix_labels, seed)), found.folder, found.place, n=n, seed=seed)
