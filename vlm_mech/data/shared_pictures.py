"""Which examples hang together: those of one group, and those that show a picture of the same pixels."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vlm_mech.inputs.image import ImageLike, load_image


def pixel_hash(image: ImageLike) -> str:
    """A hash of the size and the pixels of a picture, however it is stored."""
    loaded = load_image(image)
    return hashlib.sha256(repr(loaded.size).encode() + loaded.tobytes()).hexdigest()


def linked_groups(groups: Sequence[str], shown: Sequence[Sequence[str]]) -> list[str | None]:
    """The group of each example, in which are all that share a picture with it, over others too; None if it is alone.

    Args:
        groups: of each example, its id where it has none.
        shown: hashes of its pictures.
    """
    # The first picture of every example comes first, and stands for it.
    rows = [(0, number) for number in range(len(groups))]
    rows += [(at, number) for number, each in enumerate(shown) for at in range(1, len(each))]
    keys = [groups[number] for _, number in rows], [shown[number][at] for at, number in rows]
    numbers = components(*keys)[: len(groups)].tolist() if groups else []
    first, sizes = dict[int, str](), Counter(numbers)
    for number, group in zip(numbers, groups, strict=True):
        first.setdefault(number, group)
    return [None if sizes[number] == 1 else first[number] for number in numbers]


def components(*keys: Sequence[str]) -> Int[np.ndarray, "example"]:
    """Numbers of the groups in which examples hang together that share a value of any of the keys."""
    n_examples, rows, columns, n_values = len(keys[0]), [], [], 0
    for values in keys:
        numbers = np.unique(np.asarray(values, dtype=str), return_inverse=True)[1]
        rows.append(np.arange(n_examples))
        columns.append(n_examples + n_values + numbers)
        n_values += int(numbers.max()) + 1
    row, column, size = np.concatenate(rows), np.concatenate(columns), n_examples + n_values
    found = connected_components(coo_array((np.ones(len(row)), (row, column)), shape=(size, size)), directed=False)[1]
    return np.unique(found[:n_examples], return_inverse=True)[1]
