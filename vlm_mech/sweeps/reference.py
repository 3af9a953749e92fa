"""The reference: one whole traced forward pass for each intervention; and what is kept of logits."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.teacher_forcing import each_alone
from vlm_mech.interventions.plan import plan
from vlm_mech.interventions.receipt import Receipt, verify
from vlm_mech.interventions.specification import Intervention
from vlm_mech.interventions.trace import Run, carry_out, read, run
from vlm_mech.sweeps.replay import Wave
from vlm_mech.sweeps.shares import Bytes

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Keep = Callable[[int, Tensor], Tensor]
"""What is kept of an intervention, from its number and its logits, batch x read x vocab."""
Listen = Callable[[list[int], Wave, Tensor, Tensor], None]
"""Is given the numbers of some versions, their wave, and the keys and values that a block just made of its rows."""


@dataclass(eq=False)
class Reference:
    """The same answers by one whole traced forward pass for each intervention, and for each answer that follows."""

    vlm: "VLM"
    encoded: Encoded
    budget: Bytes | None = None
    alone: list[Encoded] = field(init=False)

    def __post_init__(self) -> None:
        self.alone = each_alone(self.encoded)

    @functools.cached_property
    def unedited(self) -> list[Run]:
        """The unedited run over each answer, made when it is first needed."""
        return [run(self.vlm, each) for each in self.alone]

    @property
    def baseline(self) -> Float[Tensor, "batch vocab"]:
        """Next-token logits of the unedited run."""
        return self.unedited[0].last

    @property
    def reads(self) -> Float[Tensor, "batch read vocab"]:
        """As `Engine.reads`."""
        return _side_by_side(self.unedited)

    def lend(self, other: "Reference") -> None:
        """Nothing is shared."""

    def afresh(self) -> "Reference":
        """As `Engine.afresh`; nothing was lent."""
        return self

    def answers(
        self, interventions: Sequence[Intervention], *, max_cells: int = 1, keep: Keep | None = None
    ) -> tuple[Tensor, list[tuple[Receipt, ...]]]:
        """As `Engine.answers`; the receipts are those of the passes over each answer."""
        kept, proofs = Kept(len(interventions), keep or next_token), []
        for number, each in enumerate(interventions):
            done = [run(self.vlm, one, each, baseline=of) for one, of in zip(self.alone, self.unedited, strict=True)]
            kept.take(number, _side_by_side(done))
            proofs.append(tuple(receipt for one in done for receipt in one.receipts))
        assert kept.found is not None, "there is an intervention"
        return kept.found, proofs

    def logits(self, intervention: Intervention) -> Float[Tensor, "batch read vocab"]:
        """Logits as in `reads` under an intervention, its receipts verified.

        The unedited run is made only for edits that cannot reach the answer: that the logits stay as they are is then
        part of the proof.
        """
        done = []
        for number, one in enumerate(self.alone):
            made = plan(self.vlm, one, intervention, lambda source, sites: read(self.vlm, source, sites))
            _, logits, receipts = carry_out(self.vlm, one, made)
            assert logits is not None, "the pass runs to its end"
            done.append(Run(logits, one))
            if not any(each.reaches for each in receipts):
                moved = (done[-1].reads - self.unedited[number].reads).abs().max().item()
                receipts = tuple(dataclasses.replace(each, pass_readout_change=moved) for each in receipts)
            verify(receipts)
        return _side_by_side(done)


def read_side_by_side(vlm: "VLM", encoded: Encoded, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """States as one pass over all the answers would have them, from passes over one each."""
    first, *others = (read(vlm, one, sites).values for one in each_alone(encoded))
    own = {site: [other[site][:, encoded.n_prompt :] for other in others] for site in sites if site.place == "llm"}
    return {site: torch.cat([first[site], *own.get(site, ())], 1) for site in sites}


def _side_by_side(runs: Sequence[Run]) -> Float[Tensor, "batch read vocab"]:
    """Logits of passes over one answer each, in the order of one pass over all of them."""
    return torch.cat([each.reads if number == 0 else each.reads[:, 1:] for number, each in enumerate(runs)], 1)


@dataclass(eq=False)
class Kept:
    """What is kept of the logits of each of so many interventions, and who listens to their keys and values."""

    n: int
    keep: Keep
    listen: Listen | None = None
    found: Tensor | None = None

    def take(self, number: int, logits: Float[Tensor, "batch read vocab"]) -> None:
        """Keeps what is kept of an intervention's logits."""
        made = self.keep(number, logits)
        if self.found is None:
            self.found = made.new_empty(self.n, *made.shape)
        self.found[number] = made


def next_token(_: int, logits: Float[Tensor, "batch read vocab"]) -> Float[Tensor, "batch vocab"]:
    """Logits of the prompt's next token."""
    return logits[:, 0]
