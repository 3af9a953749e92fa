"""Edits of tower and projector: several edited versions of a batch in one pass that ends where the decoder begins.

The pass is the model's own over copies of the batch, one for each version. For its duration every block of the tower
computes only the copies that differ from the clean pass by then; to the others it gives what it gave there. A copy goes
alone through a block in which it is edited, exactly as the reference does it; all others go through together.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm_mech.architectures.site import Site
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.attention import cutting
from vlm_mech.interventions.module_hooks import forward_through, narrowed, passed
from vlm_mech.interventions.passes import prompt_pass
from vlm_mech.interventions.plan import Plan
from vlm_mech.interventions.receipt import Receipt, ReceiptError
from vlm_mech.interventions.timeline import beside_of, witness_of
from vlm_mech.interventions.trace import cuttings_of
from vlm_mech.interventions.verification import Proofs, receipts_of
from vlm_mech.sweeps.branching import tower_blocks
from vlm_mech.sweeps.shares import block_devices

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Forward = Callable[..., Tensor]


class _EnoughError(Exception):
    """Ends a pass where nothing more of it is wanted."""


def tower_outputs(vlm: "VLM", encoded: Encoded) -> list[Tensor]:
    """What each block of the tower gives in the clean pass, in the model's own shape; nothing after them is run."""
    blocks, found = list(vlm.model.get_submodule(vlm.family.vision.path)), []

    def keep(block: nn.Module, _: Any, out: Tensor) -> None:
        found.append(out.detach())
        if block is blocks[-1]:
            raise _EnoughError

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        with torch.no_grad(), vlm.passing(), suppress(_EnoughError):
            vlm.model(**encoded.inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@dataclass(eq=False)
class Copy:
    """One edited version: its plan for tower and projector with what proves it, and what it brings to the decoder.

    `hidden` are the states before the decoder's first block, `added` the features that the model adds after the first
    blocks (deepstack). `cut` has the receipts of cut layers, made when the layer has been run.
    """

    made: Plan
    writes: Proofs
    blocks: range
    cut: dict[int, tuple[Receipt, ...]] = field(default_factory=dict)
    hidden: Float[Tensor, "batch pos d_model"] = field(init=False)
    added: list[Float[Tensor, "token d_model"]] = field(default_factory=list)

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """What was proved, not yet verified.

        Raises:
            ReceiptError: an edited site or a cut layer was never reached.
        """
        for (_, layer), cuts in self.made.cuts.items():
            if layer not in self.cut:
                raise ReceiptError(f"{cuts[0].what} at vision.attention[{layer}]: the layer was never reached")
        return (*receipts_of(self.writes, [], 0.0), *(each for layer in sorted(self.cut) for each in self.cut[layer]))

    def sites(self, layer: int) -> list[Site]:
        """Edited sites within a block of the tower."""
        vision = [site for site in self.made.writes if site.stream == "vision" and site.layer == layer]
        return [site for site in vision if site.point != "resid_post"]

    def edited_in(self, layer: int) -> bool:
        """Whether anything is edited within a block of the tower."""
        return bool(self.sites(layer)) or ("vision", layer) in self.made.cuts

    def written(self, site: Site, states: Tensor) -> Tensor:
        """States of this copy after its writes at a site, in the shape that they were given in."""
        writes, seen = self.made.writes.get(site, ()), self.writes.seen
        if not writes:
            return states
        before = after = in_rows(states)
        for write in writes:
            after = write.apply(after)
        seen.before[site], seen.written[site] = before, after
        return after.view_as(states)


@dataclass(eq=False)
class TowerPass:
    """One pass over copies of a batch with a plan for each; `clean` are the outputs of the tower's blocks."""

    vlm: "VLM"
    encoded: Encoded
    plans: Sequence[Plan]
    clean: Sequence[Tensor]
    copies: list[Copy] = field(init=False)

    def __post_init__(self) -> None:
        # Cut layers are proved one by one, since what passes through them is large.
        self.copies = [
            Copy(each, Proofs(self.vlm, self.encoded, Plan(each.writes, {})), tower_blocks(each, self.vlm.vision_depth))
            for each in self.plans
        ]

    def run(self) -> list[Copy]:
        """The copies with what they bring to the decoder."""
        n, family = len(self.copies), self.vlm.family
        inputs = {name: torch.cat([value] * n) if n > 1 else value for name, value in self.encoded.inputs.items()}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.vlm.passing())
            blocks = self._module(family.vision.path).children()
            for layer, (block, device) in enumerate(zip(blocks, block_devices(self.vlm, "vision"), strict=True)):
                stack.enter_context(forward_through(block, partial(self._through, layer, device)))
            self._listen(stack)
            projector = self._module(family.projector)
            for name, is_input in (("projector.in", True), ("projector.out", False)):
                stack.enter_context(passed(projector, partial(self._edited, Site(name)), is_input=is_input))
            if self.vlm.taps:
                named = {"is_input": True, "argument": "deepstack_visual_embeds"}
                stack.enter_context(passed(self._module(family.decoder), self._keep_added, **named))
            first = self._module(f"{family.llm.path}.0")
            stack.enter_context(passed(first, self._end, is_input=True))
            stack.enter_context(suppress(_EnoughError))
            self.vlm.model(**inputs, use_cache=False)
        for copy in self.copies:
            copy.writes.take(prompt_pass(self.encoded))
        return self.copies

    def _module(self, path: str) -> nn.Module:
        return self.vlm.model.get_submodule(path)

    # Outside the blocks, all copies together

    def _listen(self, stack: ExitStack) -> None:
        """Keeps what is received of the sites whose receiver is not in their own block."""
        for site in {site for each in self.plans for site in each.writes}:
            witness = witness_of(self.vlm, site)
            if witness is not None and (site.stream == "projector" or site.point == "resid_post"):
                how = {"is_input": witness.is_input, "argument": witness.argument}
                stack.enter_context(passed(self._module(witness.path), partial(self._received, site), **how))

    def _received(self, site: Site, states: Tensor) -> Tensor:
        for copy, own in self._each(states):
            if site in copy.made.writes:
                # A module may be called once more, for what is pooled of the images.
                copy.writes.seen.received.setdefault(site, in_rows(own))
        return states

    def _edited(self, site: Site, states: Tensor) -> Tensor:
        if not any(site in copy.made.writes for copy in self.copies):
            return states
        return torch.cat([copy.written(site, own) for copy, own in self._each(states)])

    def _keep_added(self, features: list[Tensor]) -> list[Tensor]:
        for each in features:
            for copy, own in self._each(each):
                copy.added.append(own)
        return features

    def _end(self, states: Tensor) -> Tensor:
        for copy, own in self._each(states):
            copy.hidden = own
        raise _EnoughError

    def _each(self, states: Tensor) -> Iterator[tuple[Copy, Tensor]]:
        """The copies with their own part of something."""
        return zip(self.copies, states.chunk(len(self.copies)), strict=True)

    # In the blocks

    def _through(
        self, layer: int, device: torch.device, own: Forward, states: Tensor, *given: Any, **named: Any
    ) -> Tensor:
        """All copies through one block: those that are edited in it alone, the others that differ together."""
        states = states.to(device)

        def run(some: Tensor) -> Tensor:
            rows = {"n_rows": len(states), "kept": len(some)}
            others = {name: narrowed(value, **rows) for name, value in named.items()}
            return own(some, *(narrowed(value, **rows) for value in given), **others)

        together: list[int] = []
        # Above the blocks that are read a copy may be left as it is.
        parts = list(states.chunk(len(self.copies)))
        for number, copy in enumerate(self.copies):
            if layer < copy.blocks.start:
                parts[number] = self.clean[layer]
            elif layer in copy.blocks and copy.edited_in(layer):
                parts[number] = self._alone(copy, layer, run, parts[number])
            elif layer in copy.blocks:
                together.append(number)
        if together:
            out = run(states if len(together) == len(parts) else torch.cat([parts[number] for number in together]))
            for number, part in zip(together, out.chunk(len(together)), strict=True):
                parts[number] = part
        site = Site("vision.resid_post", layer)
        return torch.cat([copy.written(site, part) for copy, part in zip(self.copies, parts, strict=True)])

    def _alone(self, copy: Copy, layer: int, run: Forward, states: Tensor) -> Tensor:
        """One copy through a block in which it is edited."""
        sites, seen, block = copy.sites(layer), copy.writes.seen, f"{self.vlm.family.vision.path}.{layer}"
        where = ("vision", layer)
        cuts = Plan({}, {where: copy.made.cuts[where]} if where in copy.made.cuts else {})
        cuttings = cuttings_of(self.vlm, self.encoded, cuts)

        def keep(kept: dict[Site, Tensor], site: Site, states: Tensor) -> Tensor:
            kept[site] = in_rows(states)
            return states

        with ExitStack() as stack:
            stack.enter_context(cutting(cuttings))
            for site in sites:
                receivers = (seen.received, witness_of(self.vlm, site)), (seen.beside, beside_of(self.vlm, site))
                for kept, witness in receivers:
                    if witness is not None and witness.path != block:
                        look = partial(keep, kept, site)
                        stack.enter_context(passed(self._module(witness.path), look, is_input=witness.is_input))
            for site in sites:
                path, is_input = self.vlm.module_of(site)
                if path != block:
                    stack.enter_context(passed(self._module(path), partial(copy.written, site), is_input=is_input))
            out = run(copy.written(Site("vision.resid_pre", layer), states))
        for site in sites:
            if site.point == "mlp_out":
                keep(seen.received, site, out)
        if cuttings:
            copy.cut[layer] = receipts_of(Proofs(self.vlm, self.encoded, cuts), list(cuttings.values()), 0.0)
        return out


def in_rows(states: Tensor) -> Tensor:
    """States as rows x pos x width; towers that pack their images have one row without an axis for it.

    What a receiver arranges otherwise (rows x width x height x width, say) stays as it is.
    """
    return states[None] if states.ndim == 2 else states
