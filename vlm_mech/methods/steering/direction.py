"""`Direction`: a vector found for a contrast of answers, with its place, its dose and its origin; kept in a file."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import joined
from vlm_mech.interventions.specification import Steer

if TYPE_CHECKING:
    from vlm_mech.architectures.traced_model import TracedModel

FORMAT = "vlm_mech direction 1"


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction among the states of a site and span.

    `vector` (of the site's width, float32) is the difference of two means of states, as long as it was found. `norm` is
    the mean norm of states there, so that a dose is a share of it: dose 0.5 adds a vector half as long as a state. `n`
    pairs gave it; `dose` was chosen on others. `parts` has the ids of the pairs it was found on (`train`), chosen on
    (`validation`) and tested on (`test`); `told` what it did in the latter; `provenance` model, data and contrast.
    """

    vector: Float[Tensor, "width"]
    site: Site
    span: str
    norm: float
    dose: float
    n: int
    contrast: str = ""
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.vector, Tensor) or self.vector.ndim != 1 or not self.vector.is_floating_point():
            raise UsageError("the vector of a Direction is a tensor of real numbers, of shape (width,)")
        length = float(self.vector.norm())
        if not math.isfinite(length) or length == 0:
            raise UsageError(f"the vector of a Direction has norm {length:g}; a finite one above 0 is needed")
        for name in ("norm", "dose"):
            if not math.isfinite(getattr(self, name)):
                raise UsageError(f"{name} of a Direction is {getattr(self, name)}; a finite number is needed")

    def edit(self, dose: float | None = None) -> Steer:
        """The direction as an intervention, which goes with all others (`&`, `sweep`, `generate`).

        Args:
            dose: how far, as a share of the mean norm of states there; negative the other way, by default its own.

        Raises:
            UsageError: the dose is no finite number.
        """
        how_far = self.dose if dose is None else dose
        if isinstance(how_far, bool) or not isinstance(how_far, Real) or not math.isfinite(how_far):
            told = f"a {type(how_far).__name__}" if isinstance(how_far, Tensor) else repr(how_far)
            raise UsageError(f"the dose of an edit is {told:.60}; one finite number is needed")
        return steer(self.vector, self.norm, self.site, self.span, float(how_far))

    def check(self, vlm: "TracedModel") -> None:
        """Raise `UsageError` where the direction is of another model, or of states of another width.

        What is compared is the model's identity without its name, where the provenance has one.
        """
        vlm.check_site(self.site)
        if self.site.layer is not None and len(self.vector) != (width := vlm.width(self.site)):
            raise UsageError(f"the direction has {len(self.vector)} numbers; {self.site} of {vlm.name} has {width}")
        if isinstance(made := self.provenance.get("model"), dict):
            found = vlm.identity()
            keys = sorted((made.keys() | found.keys()) - {"name"})
            if different := [key for key in keys if made.get(key) != found.get(key)]:
                told = "; ".join(f"{key} {made.get(key)}, not {found.get(key)}" for key in different)
                raise UsageError(f"the direction was found in another model ({made.get('name')}): {told}")

    def with_vector(self, vector: Float[Tensor, "width"]) -> "Direction":
        """Another vector at the same place and doses, such as one of `random_directions`."""
        return dataclasses.replace(self, vector=vector, told={})

    def save(self, path: str | Path) -> None:
        """Writes the direction to one file (safetensors), with all that is known of it.

        Raises:
            UsageError: the file's folder is not there.
        """
        told = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "vector"}
        told["site"] = [self.site.name, self.site.layer]
        if not Path(path).parent.is_dir():
            raise UsageError(f"{str(path)!r} cannot be written: there is no folder {str(Path(path).parent)!r}")
        vector = self.vector.detach().float().cpu().contiguous()
        # One entry: the order of several in the file is another each time.
        save_file({"vector": vector}, path, metadata={FORMAT: json.dumps(told)})

    @classmethod
    def load(cls, path: str | Path) -> "Direction":
        """The direction that `save` wrote.

        Raises:
            UsageError: no such file, or one of something else.
        """
        try:
            with safe_open(str(path), "pt") as file:
                kept = file.metadata() or {}
                if FORMAT not in kept:
                    raise UsageError(f"{str(path)!r} holds no direction; Direction.save writes one")
                told, vector = json.loads(kept[FORMAT]), file.get_tensor("vector")
        except FileNotFoundError:
            raise UsageError(f"there is no file {str(path)!r}; Direction.save writes one") from None
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{str(path)!r} is not a file of a direction: {error}") from None
        told |= {"site": Site(*told["site"]), "parts": {name: tuple(ids) for name, ids in told["parts"].items()}}
        return cls(vector, **told)

    def __repr__(self) -> str:
        return f"Direction({self.contrast or 'unnamed'}: {self.span} at {self.site}, dose {self.dose:g}, n = {self.n})"


def steer(vector: Float[Tensor, "width"], norm: float, site: Site, span: str, dose: float) -> Steer:
    """Adds a vector of that direction, so many times as long as `norm`."""
    return Steer(site, joined(span), vector=vector / vector.norm() * norm, scale=float(dose))
