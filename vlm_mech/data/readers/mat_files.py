"""Files of MATLAB, as Pascal-Part has one for each picture."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_mech.errors import UsageError


def annotated(path: Path) -> list[Any]:
    """The objects that a file of Pascal-Part describes, each with `class`, `mask` and `parts`.

    Raises:
        UsageError: it cannot be read, or describes none.
    """
    return _annotated(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _annotated(path: Path, changed: int) -> list[Any]:
    from scipy.io import loadmat

    try:
        anno = loadmat(path, squeeze_me=True, struct_as_record=False)["anno"]
    except NotImplementedError as error:
        raise UsageError(f"{path.name} is of MATLAB 7.3 (HDF5); one of version 7 or before is needed") from error
    except KeyError as error:
        raise UsageError(f"{path.name} holds no {error.args[0]}; the struct of Pascal-Part is needed") from error
    except Exception as error:  # scipy raises what a broken file makes it stumble over
        raise UsageError(f"{path.name} cannot be read: {error}") from error
    return list(_structs(getattr(anno, "objects", [])))


def parts_of(thing: Any) -> list[Any]:
    """The parts of an object, each with `part_name` and `mask`."""
    return list(_structs(getattr(thing, "parts", [])))


def _structs(given: Any) -> Iterator[Any]:
    """A struct of MATLAB alone, or several in an array or in cells."""
    import numpy as np

    for each in np.atleast_1d(np.asarray(given, dtype=object)).ravel():
        if hasattr(each, "_fieldnames"):
            yield each
