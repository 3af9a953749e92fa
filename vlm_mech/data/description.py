"""What a data set holds, in lines, without a model: counts, groups, options, answers, chance, and what is refused."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from vlm_mech.data.counterfactual_scenes import PAIR_SETS
from vlm_mech.data.examples import SHOWN
from vlm_mech.data.facts import is_facts
from vlm_mech.data.hub import holds_classes, is_of_hub
from vlm_mech.data.image_classes import SCENES, load_classes
from vlm_mech.data.item import Item
from vlm_mech.data.items import Items, load_items
from vlm_mech.data.pair import Made, Pair
from vlm_mech.data.pairs import Pairs, load_pairs
from vlm_mech.data.readers.registry import find_source, near_misses
from vlm_mech.data.scenes import SPLITS
from vlm_mech.data.sources import find_data, what_is_there
from vlm_mech.data.training_text import describe_text
from vlm_mech.data.user_files import Refused
from vlm_mech.errors import UsageError

OWN = ("planted", "noise", "scenes/relations")
"""What experiments make themselves."""
MOST = 8
"""Values and reasons that are told one by one."""


def describe(name: str, *, n: int | None, seed: int, split: str = "test", fix_labels: bool = False) -> str:
    """What a data set holds: of pairs, of items, or of pictures with a class.

    Args:
        n, seed, split: how examples would be drawn.
        fix_labels: correct label errors that are known.

    Raises:
        UsageError: no such data, or none that can be used.
    """
    if name in OWN:
        return f"{name}: made by the experiment itself"
    drawn = {"n": n, "seed": seed, "fix_labels": fix_labels}
    if name.startswith("scenes/") and name.removeprefix("scenes/") in PAIR_SETS:
        return _pairs(name, "generated scenes", load_pairs(name, **drawn, split=split))
    if is_facts(name):
        return _pairs(name, "facts, pairs of texts", load_pairs(name, **drawn, split=split))
    if name in SCENES or (is_of_hub(name) and holds_classes(name)):
        return _classes(name, n, seed)
    source = None if is_of_hub(name) else find_source(name, others=True)
    if source is not None and source.format.holds == "classes":
        return _classes(name, n, seed)
    if source is not None and source.format.holds == "text":
        files = ", ".join(table.path.name for table in source.tables[:MOST])
        return "\n".join([f"{name}: format {source.format.name} ({files})", *describe_text(name, asked=n)])
    found = find_data(name)
    if found is None:
        # What is neither is a folder of classes, or nothing.
        if not _has_folders(Path(name)):
            return _pairs(name, "", load_pairs(name, **drawn))
        try:
            return _classes(name, n, seed)
        except UsageError as error:
            raise UsageError(f"{error}{what_is_there(name)}") from error
    if found.holds == "pairs":
        return _pairs(name, found.told, load_pairs(name, **drawn))
    return _items(name, found.told, load_items(name, **drawn))


def in_short(name: str, made: Made | None = None) -> str:
    """Whether a data set holds pairs or items, and which counterfactual pictures are made for these, in a line.

    Args:
        made: how they are made.

    Raises:
        UsageError: it is not told which of several files of a folder is meant.
    """
    if is_facts(name):
        return f"{name}: pairs of texts about facts"
    found = None if name.startswith("scenes/") else find_data(name)
    if found is None:
        return f"{name}: pairs of scenes"
    if found.holds == "pairs":
        return f"{name}: pairs ({found.told})"
    shown = f"; counterfactual image: {SHOWN[made]}" if made in SHOWN else ""
    return f"{name}: single items ({found.told}){shown}"


def _has_folders(path: Path) -> bool:
    return path.is_dir() and any(each.is_dir() for each in path.iterdir())


def _pairs(name: str, kind: str, pairs: Pairs) -> str:
    answers = [answer for pair in pairs for answer in (pair.answer, pair.counterfactual_answer)]
    sizes = [len(pair.options) or 2 for pair in pairs]
    conflicts = Counter(pair.conflict or "" for pair in pairs)
    lines = [f"{name}: {kind}", f"pairs: {len(pairs)}", _groups([pair.group or pair.id for pair in pairs])]
    lines += _shared(pairs.pairs, answers)
    lines += [_counted("in conflict", (side for side in conflicts.elements() if side))] if any(conflicts) else []
    both = sum(1 / size**2 for size in sizes) / len(sizes)
    n_without = sum(not pair.options for pair in pairs)
    without = f" (both answers for the {n_without} of {len(pairs)} pairs without options)" if n_without else ""
    lines.append(f"chance: {_mean(sizes):.3f} for one image, {both:.3f} for both of a pair{without}")
    return "\n".join([*lines, *_told(pairs)])


def _items(name: str, kind: str, items: Items) -> str:
    lines = [f"{name}: {kind}", f"items: {len(items)}", _groups([item.group or item.id for item in items])]
    lines += _shared(items.items, [item.answer for item in items])
    conflicts = Counter(item.conflict for item in items)
    if set(conflicts) != {None}:
        lines.append(f"in conflict: {conflicts[True]}, not {conflicts[False]}, not known {conflicts[None]}")
    sizes = [len(item.options) for item in items if item.options]
    without = len(items) - len(sizes)
    told = f" ({without} of {len(items)} items have no options and do not count)" if sizes and without else ""
    lines.append(f"chance: {_mean(sizes):.3f}{told}" if sizes else "chance: none, there are no options")
    return "\n".join([*lines, *_told(items)])


def _shared(examples: Sequence[Pair | Item], answers: Sequence[str]) -> list[str]:
    """What pairs and items both have."""
    lines = [_counted("images in a prompt", (str(len(each.images)) for each in examples))]
    if any(each.options for each in examples):
        lines.append(_counted("options", (str(len(each.options)) if each.options else "none" for each in examples)))
    if any(each.category for each in examples):
        lines.append(_counted("categories", (each.category or "none" for each in examples)))
    lines.append(_counted("answers", answers))
    with_prior = [each for each in examples if each.prior is not None]
    lines += [f"prior known: {len(with_prior)}"] if with_prior else []
    return lines


def _groups(groups: Sequence[str]) -> str:
    sizes = Counter(Counter(groups).values())
    told = ", ".join(f"{count} of {size}" for size, count in sorted(sizes.items())[:MOST])
    return f"groups: {len(set(groups))} ({told}{', ...' if len(sizes) > MOST else ''})"


def _counted(what: str, values: Iterable[str]) -> str:
    """How often each value occurs, the most frequent first."""
    counts = Counter(values)
    told = ", ".join(f"{value!s:.60} {count}" for value, count in counts.most_common(MOST))
    return f"{what}: {told}{f', and {len(counts) - MOST} more' if len(counts) > MOST else ''}"


def _mean(sizes: Sequence[int]) -> float:
    """The mean chance of a guess among so many."""
    return sum(1 / size for size in sizes) / len(sizes)


def _told(examples: Pairs | Items) -> list[str]:
    """How examples were drawn, what is to be told of the data, and what cannot be used."""
    lines = [f"drawn: {examples.drawn}"] if examples.drawn else []
    return [*lines, *(f"note: {note}" for note in examples.notes), *_refused(examples.refused)]


def _refused(refused: Sequence[Refused]) -> list[str]:
    lines = [f"cannot be used: {len(refused)}", *(f"  {each.told}" for each in refused[:MOST])]
    return [*lines, f"  and {len(refused) - MOST} more"] if len(refused) > MOST else lines


def _classes(name: str, n: int | None, seed: int) -> str:
    data = load_classes(name, n=n, seed=seed)
    parts = ", ".join(f"{part} {len(getattr(data, part))}" for part in SPLITS)
    lines = [f"{name}: images with a class", f"classes: {len(data.names)}", f"images: {parts}"]
    lines += [f"chance: {1 / len(data.names):.3f}", *(f"note: {note}" for note in data.notes)]
    lines += [f"note: {note}" for note in near_misses(Path(name))]
    return "\n".join([*lines, *_refused(data.refused)])
