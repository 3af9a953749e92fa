"""What a format is: the tables by which it is known, and how their rows become rows of pairs or of items."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vlm_mech.data.user_files import Refused, Row, Rows


@dataclass(frozen=True)
class ReaderOptions:
    """How a source is read.

    `fix_labels` corrects label errors that are known; `seed` draws what an official protocol draws, such as the order
    in which two options are named.
    """

    fix_labels: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Table:
    """A file of rows: where it lies, the folder it was found in, its columns, and its first row."""

    path: Path
    root: Path
    columns: tuple[str, ...]
    first: dict[str, Any] = field(default_factory=dict)
    given: Any = field(default=None, compare=False, repr=False)
    """Its rows, where they are those of a data set of the hub."""

    @property
    def name(self) -> str:
        """Its path from the folder that was given."""
        return self.path.relative_to(self.root).as_posix()

    def group_of(self, picture: Any) -> str | None:
        """What questions about one picture have in common: the path of its file; None where it lies in no file.

        Files of one name in several folders are several pictures.
        """
        if not isinstance(picture, Path):
            return None
        return picture.relative_to(self.root).as_posix() if picture.is_relative_to(self.root) else str(picture)

    def picture(self, named: Any, *folders: str) -> Any:
        """The picture that a cell names: the path of a file, or the cell itself where there is no such file.

        Args:
            named: what the cell holds; what is no text stays as it is.
            folders: in which of them, beside the table or in the root, the layout has pictures; where there is none,
                they may lie beside the table or in the root itself.
        """
        if not isinstance(named, str) or not named.strip() or len(named) > 500:
            return named
        # RePOPE has its tables in a folder of their own, beside those of pictures.
        above = (self.path.parent.parent,) if self.path.parent.name == "annotations" else ()
        bases = dict.fromkeys((self.path.parent, self.root, *above))
        laid_out = [base / folder for base in bases for folder in folders if (base / folder).is_dir()]
        # What lies elsewhere under the name of a missing picture is another one.
        places = [*laid_out, *bases] if "/" in named else laid_out or list(bases)
        # A picture that the layout's folder lacks is missing, whatever has its name elsewhere.
        lacking = bool(laid_out and Path(named).suffix and "://" not in named)
        missing = laid_out[0] / named if lacking else named
        return next((place / named for place in places if (place / named).is_file()), missing)


@dataclass(frozen=True)
class Format:
    """A format: by which columns its tables are known, and what their rows become.

    `rows` gives rows with the fields of a line of `pairs.jsonl` or `items.jsonl`, a stream of those of training text
    (`text`), or pictures with a class (`classes`); pictures are named, not opened. `fits` says whether a table with
    these columns is one, where columns alone do not tell. One that is not `known_by_files` reads files of another
    format in another way, and must be named. `layout` and `becomes` are for the table of formats in docs/data.md.
    """

    name: str
    holds: Literal["pairs", "items", "text", "classes"]
    columns: tuple[str, ...]
    rows: Callable[[Sequence[Table], ReaderOptions], Rows]
    layout: str
    becomes: str
    fits: Callable[[Table], bool] = lambda table: True
    known_by_files: bool = True

    def reads(self, table: Table) -> bool:
        """Whether a table is of this format."""
        return set(self.columns) <= set(table.columns) and self.fits(table)


def unlike_stems(tables: Sequence[Table]) -> dict[Path, str]:
    """What each table is called: its file without the suffix, with the folders before it where two are called alike."""
    stems = Counter(table.path.stem for table in tables)
    return {
        table.path: table.path.stem if stems[table.path.stem] == 1 else str(PurePosixPath(table.name).with_suffix(""))
        for table in tables
    }


class Collector:
    """Rows and refusals of a source in their order, over all its tables."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.refused: dict[int, Refused] = {}
        self.notes: list[str] = []

    @property
    def _number(self) -> int:
        return len(self.rows) + len(self.refused) + 1

    def keep(self, place: str, name: str, fields: dict[str, Any]) -> None:
        """A row: where it stands in its file, its id, its fields."""
        self.rows.append(Row(self._number, name, fields, place))

    def refuse(self, name: str, reason: object) -> None:
        """What cannot be used, and why."""
        self.refused[self._number] = Refused(name, str(reason))

    def note(self, text: str) -> None:
        """What is to be told of the source, once."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def found(self) -> Rows:
        """All of it."""
        return Rows(tuple(self.rows), self.refused, tuple(self.notes))
