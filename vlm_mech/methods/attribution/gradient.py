"""Gradients of a measure at the states of one forward pass, by plain hooks on the model's own forward.

No parameter takes part: the graph begins at the decoder's embeddings, or at the first block of the tower where a site
lies before the decoder, so that nothing is propagated back further than anyone asked.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.timeline import rows_of
from vlm_mech.sweeps.measures import Measure

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with: positional and named."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass: the states at some sites (rows x pos x width), what it began with, next-token logits.

    `start` is what the first block received (of the tower, where a site lies before the decoder), and after it the
    features that the decoder adds at image positions later (deepstack).
    """

    encoded: Encoded
    states: dict[Site, Tensor]
    start: list[Tensor]
    logits: Float[Tensor, "batch vocab"]

    @property
    def held(self) -> dict[Site, Tensor]:
        """The states outside the graph."""
        return {site: states.detach() for site, states in self.states.items()}


def forward(
    vlm: "VLM", encoded: Encoded, sites: Sequence[Site], *, track: bool, start: list[Tensor] | None = None
) -> Pass:
    """A forward pass that keeps the states at the sites, in the graph if `track`.

    Use it within `frozen`, so that the graph holds no parameters.

    Args:
        start: what the first block gets in place of its own input (see `Pass`).

    Raises:
        WorkError: the model does not compute a site.
    """
    states: dict[Site, Tensor] = {}
    head = vlm.model.get_submodule(vlm.family.head)
    with contextlib.ExitStack() as hooks, torch.set_grad_enabled(track), vlm.passing():
        begin = _Start(vlm, track, start, any(site.stream != "llm" for site in sites))
        hooks.callback(begin.hooked().remove)
        for site in sites:
            hooks.callback(_Keeper(states, site, rows_of(encoded, site.stream)).hooked(vlm).remove)
        # Logits of the last position are all that is asked for.
        hooks.callback(head.register_forward_pre_hook(_last_position).remove)
        logits = vlm.model(**encoded.inputs).logits[:, -1]
    missing = [str(site) for site in sites if site not in states]
    if missing or not begin.begun:
        raise WorkError(f"{vlm.name} does not compute {missing[0] if missing else 'its first block'} in a forward pass")
    return Pass(encoded, states, begin.begun, logits)


def gradient(made: Pass, measure: Measure, ids: Sequence[Tensor]) -> dict[Site, Tensor]:
    """Gradient of each example's measure at each site of a tracked pass, shaped like the states; 0 where none flows.

    Args:
        ids: first tokens of the measure's answers, each of shape batch.

    Raises:
        UsageError: the measure cannot be differentiated.
    """
    with torch.enable_grad():
        values = measure.of(made.logits, *ids)
        total = values.sum()
    if not values.requires_grad:
        raise UsageError(f"{measure.metric.name} has no gradient; logit_diff and prob have one")
    # Examples do not see each other, so the gradient of their sum is each one's own.
    slopes = torch.autograd.grad(total, list(made.states.values()), allow_unused=True)
    by_site = zip(made.states.items(), slopes, strict=True)
    return {site: torch.zeros_like(states) if slope is None else slope for (site, states), slope in by_site}


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter takes part in gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _last_position(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (given[0][:, -1:], *given[1:])


@dataclass(eq=False)
class _Start:
    """Makes the first block's input (`begun`) a leaf of the graph, after putting `given` in its place."""

    vlm: "VLM"
    track: bool
    given: list[Tensor] | None
    in_tower: bool
    begun: list[Tensor] = field(default_factory=list)

    def hooked(self) -> Any:
        """The handle of the hook."""
        path = f"{self.vlm.family.vision.path}.0" if self.in_tower else self.vlm.family.decoder
        hook = self.before_tower if self.in_tower else self.before_decoder
        return self.vlm.model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)

    def before_tower(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Arguments:
        """The first block of the tower takes the leaf."""
        return _with_first(given, named, self.leaves([_first(given, named)])[0])

    def before_decoder(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Arguments:
        """The decoder takes the leaves as embeddings and as features to add later."""
        added = named.get("deepstack_visual_embeds") or []
        first, *others = self.leaves([named["inputs_embeds"], *added])
        changed = {"deepstack_visual_embeds": others} if added else {}
        return given, {**named, "inputs_embeds": first, **changed}

    def leaves(self, own: list[Tensor]) -> list[Tensor]:
        chosen = own if self.given is None else self.given
        self.begun = [each.detach().clone().requires_grad_(self.track) for each in chosen]
        return self.begun


@dataclass(eq=False)
class _Keeper:
    """Keeps the states at a site, and passes on a copy: what changes that in place leaves them alone."""

    states: dict[Site, Tensor]
    site: Site
    n_rows: int

    def hooked(self, vlm: "VLM") -> Any:
        """The handle of the hook."""
        path, is_input = vlm.module_of(self.site)
        module = vlm.model.get_submodule(path)
        if is_input:
            return module.register_forward_pre_hook(self.at_input, with_kwargs=True)
        return module.register_forward_hook(self.at_output)

    def at_input(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Arguments:
        # A copy of its own: what else reads the same tensor (a tower's recorded output) is not part of this site.
        return _with_first(given, named, self.keep(_first(given, named).clone()))

    def at_output(self, _: nn.Module, __: Any, output: Any) -> Any:
        return (self.keep(output[0]), *output[1:]) if isinstance(output, tuple) else self.keep(output)

    def keep(self, value: Tensor) -> Tensor:
        self.states[self.site] = value.unflatten(0, (self.n_rows, -1)) if value.ndim == 2 else value
        return self.states[self.site].clone().reshape(value.shape)


def _first(given: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    return given[0] if given else next(iter(named.values()))


def _with_first(given: tuple[Any, ...], named: dict[str, Any], value: Tensor) -> Arguments:
    return ((value, *given[1:]), named) if given else (given, {**named, next(iter(named)): value})
