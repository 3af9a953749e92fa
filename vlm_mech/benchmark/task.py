"""Cells on a batch, and what loops over them share."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.receipt import Receipt
from vlm_mech.interventions.specification import Intervention, Knockout, Replace

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Answer = Float[Tensor, "cell batch *read"]
"""Logits of the next token or at those of answers, or the tokens that are generated."""


@dataclass(eq=False)
class Task:
    """Cells on a batch; what a rival reads off them. `n_new` tokens are generated under each, if any."""

    vlm: "VLM"
    encoded: Encoded
    donor: Encoded
    cells: list[Intervention]
    n_new: int = 0
    receipts: list[Receipt] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        """The sites at which states are put in."""
        swaps = [cell for cell in self.cells if isinstance(cell, Replace)]
        found = {site for cell in swaps for site in cell.sites if site.point == "resid_post"}
        return sorted(found, key=lambda site: site.order)

    def places(self, cell: Intervention) -> tuple[Site, Tensor, Tensor]:
        """The site of a swap, and rows and positions of its states.

        Raises:
            UsageError: the cell is no swap of what a block gives.
        """
        if not isinstance(cell, Replace) or cell.sites[0].point != "resid_post":
            at = f" at {cell.sites[0].name}" if isinstance(cell, Replace) else ""
            raise UsageError(f"it is written for Knockout and Replace at resid_post, not for {type(cell).__name__}{at}")
        found, device = self.encoded.cells(cell.span, place=cell.sites[0].place), self.vlm.device
        return cell.sites[0], found.rows.to(device), found.positions.to(device)

    def blocked(self, cell: Knockout) -> Tensor:
        """True on the edges of a knockout, batch x 1 x query x key."""
        n_rows, n_pos = self.encoded.shape("llm")
        blocked = torch.zeros(n_rows, 1, n_pos, n_pos, dtype=torch.bool, device=self.vlm.device)
        for row in range(n_rows):
            queries = torch.tensor(self.encoded.positions(cell.query, row))
            blocked[row, 0, queries[:, None], torch.tensor(self.encoded.positions(cell.key, row))] = True
        return blocked

    def mask(self, cell: Knockout | None) -> Tensor:
        """The whole mask of the cut layers (without a cell, of others), in the form that the back end takes."""
        n_pos = self.encoded.n_pos
        present = self.encoded.inputs["attention_mask"][:, None, None, :].bool()
        own = torch.eye(n_pos, dtype=torch.bool, device=self.vlm.device)
        # Padding attends to itself, so that no row of the softmax is empty.
        allowed = torch.ones_like(own).tril() & (present | own)
        allowed = allowed if cell is None else allowed & ~self.blocked(cell)
        if self.vlm.backend == "sdpa":
            return allowed
        lowest = torch.finfo(self.vlm.dtype).min
        return torch.zeros_like(allowed, dtype=self.vlm.dtype).masked_fill(~allowed, lowest)


@dataclass(eq=False)
class Begun:
    """What a loop keeps between cells: states of the other image, and masks by query span."""

    states: dict[Site, Tensor] = field(default_factory=dict)
    masks: dict[Any, Tensor] = field(default_factory=dict)

    def mask(self, task: Task, cell: Knockout) -> Tensor:
        """The mask of a knockout, made once for each pair of spans."""
        key = (cell.query, cell.key)
        if key not in self.masks:
            self.masks[key] = task.mask(cell)
        return self.masks[key]
