"""What every experiment hands back to the run contract."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

    from vlm_mech.results.result import Result


@dataclass(frozen=True)
class Outcome:
    """What an experiment hands back: its result, figures by name, and pictures to show with captions.

    `links` are other reports by what is said of them, `tables` more tables by the name of their csv. `said` are
    examples of generated answers, a row each, which the report shows.
    """

    result: "Result"
    figures: dict[str, Any]
    pictures: tuple[tuple[str, "Image.Image"], ...] = ()
    links: dict[str, str] = field(default_factory=dict)
    tables: "dict[str, pd.DataFrame]" = field(default_factory=dict)
    said: "pd.DataFrame | None" = None
