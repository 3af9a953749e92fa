"""Pictures with a class each, in three parts: generated scenes, folders of pictures, Hugging Face data sets.

The parts are for fitting (`train`), for choosing (`validation`) and for reporting (`test`). A picture that cannot be
read is refused by name and counted; none is dropped in silence.
"""

import csv
import dataclasses
import hashlib
import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from vlm_mech.data.pairs import Refused
from vlm_mech.data.scene_sampling import sample_scene
from vlm_mech.data.scenes import CLASSES, COLOURS, PRIORS, SHAPES, SPLITS, Scene, Split
from vlm_mech.data.words import words_of
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import ImageLike, load_image

SCENES = ("scenes/things", "scenes/kinds", "scenes/beetles")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}
"""How the pictures of a folder without parts of its own are dealt out, within every class."""
PER_CLASS = {"train": 5, "validation": 1, "test": 1}
"""Scenes of each class by default."""
PART_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""What folders or splits of the three parts are called."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """A picture and the name of its class; while a data set is read the picture may be encoded still (`bytes`)."""

    id: str
    image: ImageLike | Mapping[str, Any]
    label: str


@dataclass(frozen=True, eq=False)
class Classes:
    """A classification data set; `names` are the classes in its own order, `refused` the pictures left out."""

    name: str
    names: tuple[str, ...]
    train: tuple[Labelled, ...]
    validation: tuple[Labelled, ...]
    test: tuple[Labelled, ...]
    refused: tuple[Refused, ...] = ()

    @property
    def digest(self) -> str:
        """A hash of every pixel and label that is used."""
        found = hashlib.sha256(json.dumps(self.names).encode())
        for part in SPLITS:
            for each in getattr(self, part):
                loaded = load_image(each.image)
                found.update(repr((part, each.id, each.label, loaded.size)).encode() + loaded.tobytes())
        return found.hexdigest()[:16]


def normalised(name: str) -> str:
    """The words of a name (`data.words`), one space between them; punctuation and underscores part words."""
    return " ".join(words_of(name))


def check_names(names: Sequence[str]) -> None:
    """Raises `UsageError` for fewer than two classes, a name without any word, or two names that are the same words."""
    if len(names) < 2:
        raise UsageError(f"there is only the class {', '.join(names) or '(none)'}; at least two are needed")
    known: dict[str, str] = {}
    for name in names:
        words = normalised(name)
        if not words:
            raise UsageError(f"class name {name!r} holds no word; one is needed to look for in an answer")
        if words in known:
            raise UsageError(f"class names {known[words]!r} and {name!r} are the same words {words!r}; rename one")
        known[words] = name


def load_classes(
    data: str,
    *,
    n: int | None = None,
    n_train: int | None = None,
    n_validation: int | None = None,
    seed: int = 0,
    names: Path | None = None,
) -> Classes:
    """A data set by name (`scenes/things`, `scenes/kinds`, `scenes/beetles`, `hf:owner/name`) or folder.

    A folder holds one folder a class, named after it, or `train`, `validation` and `test` that do. Without parts of its
    own its pictures are dealt out by the seed.

    Args:
        n: test pictures, classes in equal shares where they are drawn; all of a folder by default.
        n_train: pictures to fit probes on. n_validation: pictures to choose by.
        names: csv of `folder,name`, for folders that are not called by the name of their class.

    Raises:
        UsageError: no such data, an empty class, a class with too few pictures, or names that `check_names` refuses.
    """
    sizes = {"train": n_train, "validation": n_validation, "test": n}
    for part, size in sizes.items():
        if size is not None and size < 1:
            raise UsageError(f"{size} {part} pictures are asked for; at least one is needed")
    if data in SCENES:
        return _scenes(data, sizes, seed)
    if data.startswith("hf:"):
        return from_splits(data, _downloaded(data.removeprefix("hf:")), sizes, seed=seed, names=names)
    folder = Path(data)
    if not folder.is_dir():
        raise UsageError(f"data {data!r} is neither a folder, nor hf:owner/name, nor one of {', '.join(SCENES)}")
    found = {part: _first_of(folder, PART_NAMES[part]) for part in SPLITS}
    parts: dict[str, list[Labelled]]
    if found["train"] is None:
        parts = _dealt(_in_folder(folder), seed)
    else:
        missing = next((part for part in SPLITS if found[part] is None), None)
        if missing:
            raise UsageError(f"folder {data!r} has a part {found['train'].name!r} but none for {missing}")
        parts = {part: _in_folder(path) for part, path in found.items() if path is not None}
    return _finished(str(folder), parts, sizes, seed, names)


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
    from vlm_mech.data.render import render

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


def _first_of(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _in_folder(folder: Path) -> list[Labelled]:
    """Every picture file below the folder of each class; the label is that folder's name."""
    found: list[Labelled] = []
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise UsageError(f"folder {str(folder)!r} holds no folder of a class")
    for path in classes:
        files = sorted(each for each in path.rglob("*") if each.suffix.lower() in ENDINGS)
        if not files:
            raise UsageError(f"class folder {str(path)!r} holds no picture ({' '.join(ENDINGS)})")
        found += [Labelled(str(each.relative_to(folder)), each, path.name) for each in files]
    return found


def _dealt(every: Iterable[Labelled], seed: int, shares: Mapping[str, float] = SHARES) -> dict[str, list[Labelled]]:
    """The pictures of each class dealt out over the parts in their shares, at least one each."""
    by_class: dict[str, list[Labelled]] = {}
    for each in every:
        by_class.setdefault(each.label, []).append(each)
    parts: dict[str, list[Labelled]] = {part: [] for part in shares}
    for label, some in by_class.items():
        if len(some) < len(shares):
            raise UsageError(
                f"class {label!r} has {len(some)} picture(s); at least {len(shares)} are needed, one a part"
            )
        mixed = random.Random(f"{seed}/{label}").sample(some, len(some))
        later = list(shares)[1:]
        for part in later:
            size = min(max(1, round(shares[part] * len(some))), len(mixed) - len(later))
            parts[part] += mixed[:size]
            mixed = mixed[size:]
        parts[next(iter(shares))] += mixed
    return parts


def _downloaded(name: str) -> Any:
    if find_spec("datasets") is None:
        raise UsageError(f"data 'hf:{name}' needs datasets, which is not installed: pip install datasets")
    import datasets

    owner, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(owner, configuration or None)
    except (OSError, ValueError) as error:
        raise UsageError(f"data set {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error


def from_splits(
    name: str, splits: Mapping[str, Any], sizes: Mapping[str, int | None], *, seed: int, names: Path | None = None
) -> Classes:
    """The splits of a `datasets.DatasetDict` with an image column and a class label, as the three parts.

    A missing validation split is dealt out of the training split; a missing test split too.

    Raises:
        UsageError: no training split, or no column of images or of class labels.
    """
    known = {part: next((splits[each] for each in PART_NAMES[part] if each in splits), None) for part in SPLITS}
    if known["train"] is None:
        raise UsageError(f"data set {name!r} has the splits {', '.join(splits)}; one called train is needed")
    parts = {part: _rows(name, part, split) for part, split in known.items() if split is not None}
    missing = [part for part in ("validation", "test") if part not in parts]
    if missing:
        shares = {"train": SHARES["train"]} | {part: SHARES[part] for part in missing}
        parts |= _dealt(parts["train"], seed, {part: share / sum(shares.values()) for part, share in shares.items()})
    return _finished(name, parts, sizes, seed, names)


def _rows(name: str, part: str, split: Any) -> list[Labelled]:
    """The rows of a split; images stay encoded, so that a broken one can be refused by name."""
    kinds = {column: type(feature).__name__ for column, feature in split.features.items()}
    columns = {
        kind: next((column for column in kinds if kinds[column] == kind), None) for kind in ("Image", "ClassLabel")
    }
    for kind, column in columns.items():
        if column is None:
            raise UsageError(f"data set {name!r} has no column of type {kind}; its columns: {kinds}")
    image, label = columns["Image"], columns["ClassLabel"]
    raw = split.cast_column(image, type(split.features[image])(decode=False))
    known = split.features[label].names
    return [Labelled(f"{part} {number}", row[image], known[row[label]]) for number, row in enumerate(raw)]


def _finished(
    name: str, parts: Mapping[str, list[Labelled]], sizes: Mapping[str, int | None], seed: int, names: Path | None
) -> Classes:
    """The parts with proper class names and no more pictures than asked for; broken ones are refused."""
    folders = list(dict.fromkeys(each.label for part in SPLITS for each in parts[part]))
    called = _called(folders, names)
    check_names(list(called.values()))
    kept: dict[str, tuple[Labelled, ...]] = {}
    refused: list[Refused] = []
    for part in SPLITS:
        # Classes in turn, so that fewer pictures are still of all classes.
        some = _in_turn(parts[part], random.Random(f"{seed}/{part}"))
        kept[part] = tuple(_readable(some, sizes[part], called, refused))
        missing = set(folders) - {each.label for each in parts[part]}
        if missing:
            raise UsageError(f"class {min(missing)!r} has no picture in the {part} part of {name}")
        if not kept[part]:
            raise UsageError(f"the {part} part of {name} has no picture that can be read: {refused[-1].reason}")
    return Classes(name, tuple(called.values()), **kept, refused=tuple(refused))


def _called(folders: Sequence[str], names: Path | None) -> dict[str, str]:
    """The name of each folder's class: what the csv says, or the folder's own, underscores as spaces."""
    if names is None:
        return {folder: " ".join(folder.replace("_", " ").split()) for folder in folders}
    try:
        with names.open(newline="", encoding="utf-8") as opened:
            told = {row[0].strip(): row[1].strip() for row in csv.reader(opened) if len(row) >= 2}
    except OSError as error:
        raise UsageError(f"names {str(names)!r} cannot be read: {error}") from error
    missing = [folder for folder in folders if folder not in told]
    if missing:
        raise UsageError(f"names {str(names)!r} has no line for the class {missing[0]!r}; lines are folder,name")
    return {folder: told[folder] for folder in folders}


def _in_turn(some: Sequence[Labelled], rng: random.Random) -> Iterator[Labelled]:
    by_class: dict[str, list[Labelled]] = {}
    for each in rng.sample(list(some), len(some)):
        by_class.setdefault(each.label, []).append(each)
    while by_class:
        for label in list(by_class):
            yield by_class[label].pop()
            if not by_class[label]:
                del by_class[label]


def _readable(
    some: Iterable[Labelled], n: int | None, called: Mapping[str, str], refused: list[Refused]
) -> Iterator[Labelled]:
    """The first n pictures that can be read; those met that cannot be are added to `refused`."""
    made = 0
    for each in some:
        if made == n:
            return
        try:
            image = _decoded(each.image)
        except UsageError as error:
            refused.append(Refused(each.id, str(error)))
            continue
        made += 1
        yield Labelled(each.id, image, called[each.label])


def _decoded(image: Any) -> ImageLike:
    """A picture that opens: files stay paths, so that a large data set need not fit into memory."""
    if not isinstance(image, Mapping):
        load_image(image)
        return image
    if image.get("bytes") is None:
        return _decoded(Path(image["path"]))
    try:
        return load_image(Image.open(io.BytesIO(image["bytes"])))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"the image cannot be read: {error}") from error
