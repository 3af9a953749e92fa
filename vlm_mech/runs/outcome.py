"""What every experiment hands back to the run contract."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from vlm_mech.results.result import Result


@dataclass(frozen=True)
class Outcome:
    """What an experiment hands back: its result, figures by name, and pictures to show with captions."""

    result: "Result"
    figures: dict[str, Any]
    pictures: tuple[tuple[str, "Image.Image"], ...] = ()
