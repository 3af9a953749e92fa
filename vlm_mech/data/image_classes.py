"""Pictures with a class each, in three parts: generated scenes, folders of pictures, Hugging Face data sets.

How they are dealt out and drawn is in `data.picture_splits`.
"""

import dataclasses
import hashlib
import json
import mimetypes
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_mech.data.class_names import check_names, unique_names
from vlm_mech.data.class_parts import completed, parts_of_items, parts_of_lines
from vlm_mech.data.hub import holds_classes, hub_splits, is_of_hub
from vlm_mech.data.picture_splits import Labelled, deal, draw_parts
from vlm_mech.data.readers.format import Table
from vlm_mech.data.readers.registry import find_source
from vlm_mech.data.render import render
from vlm_mech.data.scene_sampling import sample_scene
from vlm_mech.data.scenes import CLASSES, COLOURS, PRIORS, SHAPES, SPLITS, Scene, Split
from vlm_mech.data.sources import find_data
from vlm_mech.data.user_files import Refused, check_count, read_told
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image

SCENES = ("scenes/things", "scenes/kinds", "scenes/beetles")
PER_CLASS = {"train": 5, "validation": 1, "test": 1}
"""Scenes of each class by default."""
PART_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""What folders or splits of the three parts are called."""


@dataclass(frozen=True, eq=False)
class Classes:
    """A classification data set.

    `names` are the classes in its own order, `refused` the pictures left out; `notes` say how parts were dealt out or
    drawn, and which classes got a number because others have the same name. `said` are the names without that number,
    as text has them; empty where none has one.
    """

    name: str
    names: tuple[str, ...]
    train: tuple[Labelled, ...]
    validation: tuple[Labelled, ...]
    test: tuple[Labelled, ...]
    refused: tuple[Refused, ...] = ()
    notes: tuple[str, ...] = ()
    said: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """A hash of every pixel and label that is used."""
        found = hashlib.sha256(json.dumps(self.names).encode())
        for part in SPLITS:
            for each in getattr(self, part):
                loaded = load_image(each.image)
                found.update(repr((part, each.id, each.label, loaded.size)).encode() + loaded.tobytes())
        return found.hexdigest()[:16]


def load_classes(
    data: str,
    *,
    n: int | None = None,
    n_train: int | None = None,
    n_validation: int | None = None,
    seed: int = 0,
    names: Path | None = None,
) -> Classes:
    """A data set by name (`scenes/things`, `scenes/kinds`, `scenes/beetles`, `hf:owner/name`), folder or format.

    Of single items (`data.items`) the answer is the class; they are dealt out.


    A folder holds one folder a class, named after it, or `train`, `validation` and `test` that do (in any case, and as
    `val`, `valid`, `dev` or `training` too). Without parts of its own its pictures are dealt out by the seed. Files and
    folders whose name begins with a dot are no pictures; no two parts, and no two classes, share a picture of the same
    pixels.

    Args:
        n: test pictures, drawn with the seed, classes in turn; all of a folder by default.
        n_train: pictures to fit probes on. n_validation: pictures to choose by.
        names: csv of `folder,name`, for folders that are not called by the name of their class.

    Raises:
        UsageError: no such data, an empty class, a class with too few pictures, or names that are
            the same words, or none.
    """
    sizes = {"train": n_train, "validation": n_validation, "test": n}
    for part, size in sizes.items():
        if size is not None:
            check_count(size, f"the number of {part} images", "image")
    if data in SCENES:
        return _scenes(data, sizes, seed)
    if is_of_hub(data) and holds_classes(data):
        return from_splits(data, hub_splits(data), sizes, seed=seed, names=names)
    source = None if is_of_hub(data) else find_source(data, others=True)
    if source is not None and source.format.holds == "classes":
        return _from_format(data, source.tables, sizes, seed, names)
    known = find_data(data)
    if known is not None and known.holds == "items":
        return _of_items(data, sizes, seed, names)
    folder = Path(data)
    if not folder.is_dir():
        raise UsageError(f"data {data!r} is neither a folder, nor hf:owner/name, nor one of {', '.join(SCENES)}")
    found = _parts_in(folder)
    refused = _beside(folder)
    if found:
        parts, notes = {part: _in_folder(path) for part, path in found.items()}, []
        refused += [each for path in found.values() for each in _beside(path)]
    else:
        parts, unused = deal(_in_folder(folder), seed)
        refused, notes = [*refused, *unused], [f"parts dealt out with seed {seed}"]
    order = {each.label: each.label for part in SPLITS for each in parts[part]}
    return _finished(_Read(str(folder), parts, order, refused, notes), sizes, seed, names)


# Scenes


def class_names(data: str) -> tuple[str, ...]:
    """The classes of a generated data set: every colour of every kind (things), the kinds, or the kinds of beetle."""
    kinds = (*SHAPES, *PRIORS)
    if data == "scenes/kinds":
        return kinds
    return tuple(CLASSES) if data == "scenes/beetles" else tuple(f"{c} {kind}" for kind in kinds for c in COLOURS)


def _scenes(data: str, sizes: dict[str, int | None], seed: int) -> Classes:
    names, parts = class_names(data), {}
    for part in SPLITS:
        # Probes are fitted on scenes that the embedded models were not trained on either.
        split: Split = "test" if part == "test" else "validation"
        size = PER_CLASS[part] * len(names) if sizes[part] is None else sizes[part]
        parts[part] = tuple(_sampled(data, names, part, split, size, seed))
    return Classes(data, names, **parts)


def _sampled(data: str, names: tuple[str, ...], part: str, split: Split, n: int, seed: int) -> Iterator[Labelled]:
    """Scenes with one thing (beetles may have another beside them), classes in turn, in an order drawn anew a round."""
    rng, made = random.Random(f"{data}/{part}/{seed}"), 0
    while made < n:
        for name in rng.sample(names, min(len(names), n - made)):
            scene = _of_class(data, name, rng)
            while scene.split != split:
                scene = _of_class(data, name, rng)
            made += 1
            yield Labelled(f"{part} {made:05d} {scene.key[:8]}", render(scene), name)


def _of_class(data: str, name: str, rng: random.Random) -> Scene:
    scene = sample_scene("beetle" if data == "scenes/beetles" else "single", rng)
    if data == "scenes/beetles":
        changes: dict[str, Any] = {"species": name}
    elif data == "scenes/kinds":
        changes = {"kind": name, "colours": (rng.choice(list(COLOURS)),)}
    else:
        colour, kind = name.split()
        changes = {"kind": kind, "colours": (colour,)}
    first, *others = scene.things
    return dataclasses.replace(scene, things=(dataclasses.replace(first, **changes), *others))


# Folders and data sets


def _parts_in(folder: Path) -> dict[str, Path]:
    """The folder of each part; none where there are no parts, or one name alone is like that of a part and is a class.

    Raises:
        UsageError: a part is missing, or there twice.
    """
    found = {part: [path for path in _folders(folder) if path.name.lower() in PART_NAMES[part]] for part in SPLITS}
    named = [path for paths in found.values() for path in paths]
    # A folder `train` of pictures may be the class of trains.
    if not named or (len(named) == 1 and not _folders(named[0])):
        return {}
    told = ", ".join(repr(path.name) for path in named)
    for part, paths in found.items():
        if len(paths) != 1:
            number = "two" if paths else "none"
            raise UsageError(f"folder {str(folder)!r} has the parts {told}, {number} for {part}; each part needs one")
    return {part: paths[0] for part, paths in found.items()}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_picture(path: Path) -> bool:
    """Whether the file is called like a picture, of a kind that can be read or not; hidden ones are none."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    named = kind in Image.OPEN or (mimetypes.guess_type(path.name)[0] or "").startswith("image/")
    return named and not path.name.startswith(".") and path.is_file()


def _beside(folder: Path) -> list[Refused]:
    """The pictures that lie beside the folders of classes, or of parts."""
    return [
        Refused(path.name, "it lies in no folder of a class") for path in sorted(folder.iterdir()) if _is_picture(path)
    ]


def _in_folder(folder: Path) -> list[Labelled]:
    """Every picture file below the folder of each class, none that is hidden; the label is that folder's name."""
    found: list[Labelled] = []
    classes = _folders(folder)
    if not classes:
        raise UsageError(f"folder {str(folder)!r} holds no folder of a class")
    for path in classes:
        files = sorted(each for each in path.rglob("*") if _is_picture(each))
        files = [each for each in files if not any(name.startswith(".") for name in each.relative_to(path).parts)]
        if not files:
            raise UsageError(f"class folder {str(path)!r} holds no image")
        if all(each.parent != path for each in files):
            inner = ", ".join(dict.fromkeys(each.relative_to(path).parts[0] for each in files))
            raise UsageError(
                f"class folder {str(path)!r} holds no image itself, only in {inner:.60}; needed is a folder a class "
                "with its images, or train, validation and test with such folders"
            )
        found += [Labelled(str(each.relative_to(folder)), each, path.name) for each in files]
    return found


def from_splits(
    name: str, splits: Mapping[str, Any], sizes: Mapping[str, int | None], *, seed: int, names: Path | None = None
) -> Classes:
    """The splits of a `datasets.DatasetDict` with an image column and a class label, as the three parts.

    Rows without a label (-1, as in test splits whose labels are kept secret) are refused. A validation or test split
    that is missing, or has no label at all, is dealt out of the training split.

    Raises:
        UsageError: no training split, none with labels, or no column of images or of class labels.
    """
    known = {part: next((splits[each] for each in PART_NAMES[part] if each in splits), None) for part in SPLITS}
    if known["train"] is None:
        raise UsageError(f"data set {name!r} has the splits {', '.join(splits)}; one called train is needed")
    refused: list[Refused] = []
    parts = {part: _rows(name, part, split, refused) for part, split in known.items() if split is not None}
    if not parts["train"]:
        raise UsageError(
            f"no row of the train split of {name!r} has a label; labelled rows are needed to fit and to test"
        )
    parts, notes = completed(parts, refused, seed)
    said = _column(name, known["train"], "ClassLabel")[1].names
    order = dict(zip(unique_names(said), said, strict=True))
    return _finished(_Read(name, parts, order, refused, notes), sizes, seed, names)


def _from_format(
    data: str, tables: Sequence[Table], sizes: Mapping[str, int | None], seed: int, names: Path | None
) -> Classes:
    """Pictures of a format that has them with a class and a part."""
    parts, order, refused, alike = parts_of_lines(data, tables)
    parts, notes = completed(parts, refused, seed)
    return _finished(_Read(data, parts, order, refused, [*alike, *notes]), sizes, seed, names)


def _of_items(data: str, sizes: Mapping[str, int | None], seed: int, names: Path | None) -> Classes:
    """Single items as pictures whose class is the answer."""
    parts, refused, notes = parts_of_items(data, seed)
    order = {label: label for label in sorted({each.label for part in SPLITS for each in parts[part]})}
    return _finished(_Read(data, parts, order, refused, notes), sizes, seed, names)


def _column(name: str, split: Any, kind: str) -> tuple[str, Any]:
    """The first column of a kind of feature, and that feature."""
    kinds = {column: type(feature).__name__ for column, feature in split.features.items()}
    column = next((column for column in kinds if kinds[column] == kind), None)
    if column is None:
        raise UsageError(f"data set {name!r} has no column of type {kind}; its columns: {kinds}")
    return column, split.features[column]


def _rows(name: str, part: str, split: Any, refused: list[Refused]) -> list[Labelled]:
    """The rows of a split that have a label, the others go to `refused`; images stay encoded until they are used."""
    (image, picture), (label, classes) = (_column(name, split, kind) for kind in ("Image", "ClassLabel"))
    known = unique_names(classes.names)
    found = []
    for number, row in enumerate(split.cast_column(image, type(picture)(decode=False))):
        key, told = f"{part} {number}", row[label]
        if told is None or not 0 <= told < len(known):
            refused.append(Refused(key, f"its label is {told}, which is no class; 0 to {len(known) - 1} are"))
        else:
            found.append(Labelled(key, row[image], known[told]))
    return found


@dataclass(frozen=True)
class _Read:
    """The pictures of a data set by part, its classes in order, what is left out already, and how parts arose.

    Each class has its name next to it, where a number tells several of one name apart.
    """

    name: str
    parts: Mapping[str, list[Labelled]]
    order: Mapping[str, str]
    refused: Sequence[Refused]
    notes: Sequence[str]


def _finished(read: _Read, sizes: Mapping[str, int | None], seed: int, names: Path | None) -> Classes:
    """The parts with proper class names and no more pictures than asked for."""
    used = {each.label for part in SPLITS for each in read.parts[part]}
    folders = [folder for folder in read.order if folder in used]
    given = _called([read.order[folder] for folder in folders] if names is None else folders, names)
    numbered = _called(folders, names)
    called = dict(zip(folders, unique_names(numbered), strict=True))
    check_names(list(called.values()))
    for part in SPLITS:
        missing = used - {each.label for each in read.parts[part]}
        if missing:
            raise UsageError(f"class {min(missing)!r} has no image in the {part} part of {read.name}")
    drawn = draw_parts(read.name, read.parts, sizes, seed)
    kept = {
        part: tuple(dataclasses.replace(each, label=called[each.label]) for each in some)
        for part, some in drawn.parts.items()
    }
    renamed = [new for old, new in zip(given, called.values(), strict=True) if old != new]
    notes = [
        *read.notes,
        *drawn.notes,
        *([f"classes of one name are numbered: {', '.join(renamed)}"] if renamed else []),
    ]
    told = {"refused": (*read.refused, *drawn.refused), "notes": tuple(notes), "said": tuple(given) if renamed else ()}
    return Classes(read.name, tuple(called.values()), **kept, **told)


def _called(folders: Sequence[str], names: Path | None) -> list[str]:
    """The name of each folder's class: what the csv says, or the folder's own, underscores as spaces."""
    if names is None:
        return [" ".join(folder.replace("_", " ").split()) for folder in folders]
    told = read_told(names, "names", "folder,name")
    missing = [folder for folder in folders if folder not in told]
    if missing:
        raise UsageError(f"names {str(names)!r} has no line for the class {missing[0]!r}; lines are folder,name")
    return [told[folder][1] for folder in folders]
