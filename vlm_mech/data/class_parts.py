"""Pictures with a class of official files and of single items, by part."""

from collections import Counter
from collections.abc import Sequence

from vlm_mech.data.class_names import unique_names
from vlm_mech.data.items import load_items
from vlm_mech.data.picture_splits import SHARES, Labelled, deal
from vlm_mech.data.readers.format import Table
from vlm_mech.data.readers.vlmclassifier import names_beside, pictured
from vlm_mech.data.scenes import SPLITS
from vlm_mech.data.user_files import Refused
from vlm_mech.errors import UsageError


def completed(
    parts: dict[str, list[Labelled]], refused: list[Refused], seed: int
) -> tuple[dict[str, list[Labelled]], list[str]]:
    """The parts, a missing one dealt out of the training part, and what is told of that; more goes to `refused`."""
    missing = [part for part in ("validation", "test") if not parts.get(part)]
    if not missing:
        return parts, []
    shares = {"train": SHARES["train"]} | {part: SHARES[part] for part in missing}
    shares = {part: share / sum(shares.values()) for part, share in shares.items()}
    dealt, unused = deal(parts["train"], seed, shares)
    refused += unused
    return parts | dealt, [f"{' and '.join(missing)}: dealt out of the training split with seed {seed}"]


def parts_of_lines(
    data: str, tables: Sequence[Table]
) -> tuple[dict[str, list[Labelled]], dict[str, str], list[Refused], list[str]]:
    """The pictures of the tables by part, their classes in order with the name of each, what is no picture, notes.

    Raises:
        UsageError: none to train on.
    """
    parts: dict[str, list[Labelled]] = {part: [] for part in SPLITS}
    refused: list[Refused] = []
    for each in pictured(tables):
        if isinstance(each, Refused):
            refused.append(each)
        else:
            parts[each.part].append(Labelled(each.id, each.image, each.label))
    if not parts["train"]:
        why = f": {refused[0].told}" if refused else ""
        raise UsageError(f"data {data!r} has no image to train on{why}")
    listed = names_beside(tables)
    numbered = zip(unique_names(listed), listed, strict=True)
    # A label that is a name stands for all classes of that name.
    order = {label: name for some, name in numbered for label in (some, name)}
    used = {each.label: each.label for part in SPLITS for each in parts[part]}
    alike = [name for name, count in Counter(listed).items() if count > 1 and name in used]
    notes = [f"the list has several classes of one name, one class as labels are names: {', '.join(alike)}"]
    return parts, order or used, refused, notes if alike else []


def parts_of_items(data: str, seed: int) -> tuple[dict[str, list[Labelled]], list[Refused], list[str]]:
    """Single items as pictures whose class is the answer, dealt out; those that cannot be, and what is told of them."""
    items = load_items(data, seed=seed)
    refused, shown = list(items.refused), []
    for item in items:
        if len(item.images) == 1:
            shown.append(Labelled(item.id, item.images[0], item.answer))
        else:
            refused.append(Refused(item.id, f"it shows {len(item.images)} images; one has a class"))
    parts, unused = deal(shown, seed)
    notes = [*items.notes, f"answers of items are the classes; parts dealt out with seed {seed}"]
    return parts, [*refused, *unused], notes
