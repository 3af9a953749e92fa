"""Masks as official files hold them; `data.masks` opens them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CocoMask:
    """Segmentations of COCO that mark something together: lists of polygons, or run lengths; `place` is for errors."""

    segmentations: tuple[Any, ...]
    height: int
    width: int
    place: str


@dataclass(frozen=True)
class MatMask:
    """An object of a file of Pascal-Part, or parts of it, by their numbers."""

    path: Path
    object: int
    parts: tuple[int, ...] = ()
