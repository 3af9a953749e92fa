"""State edits made of subspaces, and of the pass's own states: `Project`, and `frozen`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlm_mech.architectures.site import sites
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Span
from vlm_mech.interventions.specification import Replace, StateEdit
from vlm_mech.interventions.subspace import check_rows

if TYPE_CHECKING:
    import torch

    from vlm_mech.architectures.traced_model import TracedModel


@dataclass(frozen=True, eq=False)
class Project(StateEdit):
    """Takes what lies in a subspace out of the states (`onto=False`), or keeps nothing else of them (`onto=True`).

    With the projection P onto the rows of `basis` and the centre c, a state x becomes x - P(x - c), or c + P(x - c).

    Args:
        basis: k x width, any independent rows; with `heads` the width is that of these heads together, in their order.
        onto: whether what lies in the subspace is kept, instead of what does not.
        center: (width,), such as a mean state, for the state that has nothing in the subspace; 0 unless given.
    """

    basis: "torch.Tensor" = field(kw_only=True)
    onto: bool = field(default=False, kw_only=True)
    center: "torch.Tensor | None" = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rows("the basis of Project", self.basis)
        if not isinstance(self.onto, bool):
            raise UsageError(f"onto of Project is {self.onto!r:.60}; True or False is needed")
        if self.center is None:
            return
        from torch import Tensor

        width = self.basis.shape[1]
        if not isinstance(self.center, Tensor):
            found = type(self.center).__name__
            raise UsageError(f"the center of Project is a {found}; a torch tensor of shape ({width},) is needed")
        if self.center.shape != (width,) or not self.center.is_floating_point():
            found = f"{tuple(self.center.shape)} and dtype {self.center.dtype}"
            raise UsageError(f"the center of Project has shape {found}; real numbers of shape ({width},) are needed")
        if not self.center.isfinite().all():
            raise UsageError("the center of Project holds NaN or infinite numbers")


@dataclass(frozen=True, eq=False)
class Frozen(Replace):
    """What `frozen` gives: it knows for how many layers it was made."""

    n_layers: int = field(default=0, kw_only=True)

    def check(self, vlm: "TracedModel") -> None:
        """Raise `UsageError` where the decoder of a model has another number of layers."""
        if (found := vlm.n_layers("llm")) != self.n_layers:
            raise UsageError(f"frozen is given n_layers={self.n_layers}; the decoder of {vlm.name} has {found}")
        super().check(vlm)


def frozen(span: Span, layer: int, *, n_layers: int) -> Frozen:
    """States of a span of the decoder that stop changing at a layer, and are still read by all layers after it.

    At the input of each block above `layer` the states are those that the unedited pass has at the input of `layer`:
    what this and later blocks add to them is lost, but other positions attend to them as before.

    Args:
        span: such as "image".
        layer: the first block whose output for them is lost, from 0.
        n_layers: blocks of the decoder, such as `len(vlm.llm_layers)`.

    Raises:
        UsageError: no block is above the layer, it is below 0, or one of them is no whole number. When it is done:
            the decoder has another number of blocks.
    """
    if isinstance(n_layers, bool) or not isinstance(n_layers, int):
        raise UsageError(
            f"n_layers of frozen is {n_layers!r:.60}; a whole number, as vlm.n_layers('llm') gives, is needed"
        )
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < n_layers - 1:
        raise UsageError(f"nothing is frozen from layer {layer!r} on: of {n_layers} layers it can be 0..{n_layers - 2}")
    above = sites("llm.resid_pre", range(layer + 1, n_layers))
    return Frozen(above, span, source_site=sites("llm.resid_pre", layer) * len(above), n_layers=n_layers)
