"""Generated scenes in an official layout: `python -m vlm_mech.data.export mmvp my_folder --n 48`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from vlm_mech.data.export.items import ITEMS
from vlm_mech.data.export.others import OTHERS
from vlm_mech.data.export.pairs import PAIRS
from vlm_mech.data.export.parts import PARTS_OF_OBJECTS
from vlm_mech.data.readers.registry import formats
from vlm_mech.data.user_files import check_count
from vlm_mech.errors import UsageError, one_line_errors

WRITERS = PAIRS | ITEMS | PARTS_OF_OBJECTS | OTHERS


@dataclass(frozen=True)
class Export:
    """Writes generated scenes in the layout of an official data set: of the test split; training text: of train."""

    format: tyro.conf.Positional[str]
    """Format, such as whatsup, mmvp or pope; docs/data.md lists them."""
    folder: tyro.conf.Positional[Path]
    """Where to; a new or empty folder."""
    n: int = 48
    """Number of pairs, items or entries of training text; of paco and pascal-part of objects, an item for each part."""
    seed: int = 0
    """Draws the scenes."""


def export(format: str, folder: Path, *, n: int = 48, seed: int = 0) -> None:
    """Writes generated scenes of the test split (training text: of the train split) in the layout of a format.

    Args:
        n: number of pairs, items or entries. seed: draws the scenes.

    Raises:
        UsageError: an unknown format, no number above zero, or a folder with files in it.
    """
    written = {each.columns: each.name for each in formats() if each.name in WRITERS}
    of_same = next((written.get(each.columns) for each in formats() if each.name == format), None)
    if format not in WRITERS and of_same is not None:
        raise UsageError(f"`export {of_same}` writes the files that {format}: reads; `{format}:FOLDER` takes them")
    if format not in WRITERS:
        raise UsageError(f"format {format!r:.60} is not known; use one of {', '.join(WRITERS)}")
    check_count(n, "n", "example")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{str(folder)!r} is there already and not empty; name a new folder")
    WRITERS[format](folder, n, seed)


def main() -> None:
    """Writes the files and says how to look at them."""
    config = tyro.cli(Export, prog="python -m vlm_mech.data.export", config=(tyro.conf.FlagCreatePairsOff,))
    with one_line_errors():
        export(config.format, config.folder, n=config.n, seed=config.seed)
    print(f"wrote {config.format} to {config.folder}")
    print(f"try: python -m experiments.layer_swap --describe --data {config.format}:{config.folder}")


if __name__ == "__main__":
    main()
