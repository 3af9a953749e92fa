"""Data sets of the Hugging Face hub: `hf:NAME[:CONFIG][@SPLIT]`; NAME may be a local folder that `datasets` reads."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlm_mech.data.given_rows import undecoded
from vlm_mech.data.readers.format import Table
from vlm_mech.errors import UsageError, shortened

PREFIX = "hf:"


@dataclass(frozen=True, eq=False)
class HubData:
    """A split of a data set, pictures not decoded, as a table of which formats know the columns."""

    data: Any
    table: Table

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of its columns."""
        return self.table.columns


def is_of_hub(name: object) -> bool:
    """Whether a name is that of a data set of the hub."""
    return str(name).startswith(PREFIX)


def hub_splits(name: str) -> Mapping[str, Any]:
    """The splits of a data set by their names; the one that is named alone, if one is.

    Raises:
        UsageError: `datasets` is not installed, there is no such data set or split, or it cannot be loaded.
    """
    if find_spec("datasets") is None:
        raise UsageError(f'data {name!r} needs datasets, which is not installed: pip install "vlm_mech[data]"')
    return _loaded(name)


@functools.lru_cache(maxsize=2)
def _loaded(name: str) -> Mapping[str, Any]:
    import datasets

    place, config, split = _parted(name)
    try:
        if not split:
            return {str(each): data for each, data in datasets.load_dataset(place, config or None).items()}
        names = datasets.get_dataset_split_names(place, config or None)
        if split not in names:
            raise UsageError(f"data set {name!r} has no split {split!r}; it has {', '.join(names)}")
        return {split: datasets.load_dataset(place, config or None, split=split)}
    except UsageError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(f"data set {name!r} cannot be loaded: {shortened(str(error))}") from error


def hub_data(name: str) -> HubData:
    """The split that a name means, which may be the only one.

    Raises:
        UsageError: as `hub_splits`, or there are several and none is named.
    """
    splits, (place, config, _) = hub_splits(name), _parted(name)
    if len(splits) > 1:
        raise UsageError(
            f"data set {name!r} has the splits {', '.join(splits)}; name one, as in {name}@{[*splits][-1]}"
        )
    ((split, data),) = splits.items()
    data = undecoded(data)
    path = Path(place, *([config] if config else []), split)
    # A data set of no columns has no rows.
    first = data.select_columns(_texts(data))[0] if len(data) and _texts(data) else {}
    return HubData(data, Table(path, Path(place), tuple(data.column_names), first, data))


def holds_classes(name: str) -> bool:
    """Whether a data set has pictures and class labels, and no question about them."""
    features = next(iter(hub_splits(name).values())).features
    kinds = {type(feature).__name__ for feature in features.values()}
    return {"Image", "ClassLabel"} <= kinds and "question" not in features


def _texts(data: Any) -> list[str]:
    return [column for column, feature in data.features.items() if type(feature).__name__ != "Image"]


def _parted(name: str) -> tuple[str, str, str]:
    """Name or folder, configuration and split; the last two may be empty."""
    rest = name.removeprefix(PREFIX)
    place, at, split = rest.rpartition("@")
    if not at or "/" in split:
        place, split = rest, ""
    place, _, config = place.partition(":")
    return place, config, split
