"""What an exploration asks: a model, a prompt, what is measured, and what stands in the place of states."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_mech.architectures.site import Site, sites
from vlm_mech.data.pair import Pair
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.sweeps.measures import Measure

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

BY_COUNTERFACTUAL = "the state of the same token in the counterfactual prompt"
BY_MEAN = (
    "the mean state there: of a patch over the image tokens of this example, of another token over its other tokens "
    "but the first"
)


@dataclass(frozen=True, eq=False)
class Asked:
    """The model, the prompt, and the prompt whose states are put in the place of its own (None: mean states).

    `exchanged` says in words what these are, `notes` what is to be told of them.
    """

    vlm: "VLM"
    prompt: Prompt
    source: Prompt | None
    pair: Pair | None
    measure: Measure
    exchanged: str
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def encoded(self) -> Encoded:
        """The prompt as a batch of one, without padding."""
        return self.vlm.encode(self.prompt)

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.encoded.rows[0].present)

    @property
    def places(self) -> tuple[Site, ...]:
        """The decoder's input, and what each block leaves."""
        return (Site("llm.resid_pre", 0), *sites("llm.resid_post", self.vlm.llm_layers))

    def numbers(self, positions: tuple[int, ...]) -> list[int]:
        """The numbers of tokens at these positions, padding not counted."""
        number = {position: at for at, position in enumerate(self.encoded.rows[0].present)}
        return [number[position] for position in positions]
