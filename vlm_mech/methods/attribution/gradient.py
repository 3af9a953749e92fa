"""Gradients of a measure at the states of one forward pass, by plain hooks on the model's own forward.

No parameter takes part: the graph begins at the decoder's embeddings, or at the first block of the tower where a site
lies before the decoder, so that nothing is propagated back further than anyone asked.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.teacher_forcing import each_alone
from vlm_mech.interventions.timeline import rows_of
from vlm_mech.sweeps.readings import Readings

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with: positional and named."""


@dataclass(frozen=True, eq=False)
class Text:
    """One forward pass: the states at some sites (rows x pos x width), what it began with, and the logits read.

    `start` is what the first block received (of the tower, where a site lies before the decoder), and after it the
    features that the decoder adds at image positions later (deepstack).
    """

    states: dict[Site, Tensor]
    start: list[Tensor]
    reads: Float[Tensor, "batch read vocab"]


@dataclass(frozen=True, eq=False)
class Pass:
    """A batch of prompts, with the answers that follow, in forward passes: one, or one for each answer."""

    encoded: Encoded
    texts: list[Text]

    @property
    def reads(self) -> Float[Tensor, "batch read vocab"]:
        """Logits as one pass over all the answers would give them (see `Engine.reads`)."""
        return torch.cat(
            [each.reads if number == 0 else each.reads[:, 1:] for number, each in enumerate(self.texts)], 1
        )

    @property
    def held(self) -> dict[Site, Tensor]:
        """The states outside the graph, as one pass over all the answers would have them."""
        sites = list(self.texts[0].states)
        return {site: self._joined(site, [text.states[site].detach() for text in self.texts]) for site in sites}

    def gradient(self, total: Float[Tensor, ""]) -> dict[Site, Tensor]:
        """Gradient of a number made of `reads` at the states; 0 where none flows.

        All passes share the prompts, at whose states it is the sum; tokens of an answer are in one alone.
        """
        found: dict[Site, list[Tensor]] = {}
        for number, text in enumerate(self.texts):
            more = number + 1 < len(self.texts)
            slopes = torch.autograd.grad(total, list(text.states.values()), allow_unused=True, retain_graph=more)
            for (site, states), slope in zip(text.states.items(), slopes, strict=True):
                found.setdefault(site, []).append(torch.zeros_like(states) if slope is None else slope)
        return {site: self._joined(site, slopes, add=True) for site, slopes in found.items()}

    def _joined(self, site: Site, each: Sequence[Tensor], *, add: bool = False) -> Tensor:
        """One tensor of one a pass: the prompts' part of the first, or their sum, and the answers' parts after it."""
        if site.stream != "llm":
            return sum(each[1:], each[0]) if add else each[0]
        n_prompt = self.encoded.n_prompt
        prompts = [states[:, :n_prompt] for states in each]
        shared = sum(prompts[1:], prompts[0]) if add else prompts[0]
        return torch.cat([shared, *(states[:, n_prompt:] for states in each)], 1)


def forward(
    vlm: "VLM", encoded: Encoded, sites: Sequence[Site], *, track: bool, start: list[list[Tensor]] | None = None
) -> Pass:
    """Forward passes that keep the states at the sites, in the graph if `track`: one for each answer that follows.

    Use it within `untrained`, so that the graph holds no parameters.

    Args:
        start: for each pass, what the first block gets in place of its own input (see `Text`).

    Raises:
        WorkError: the model does not compute a site.
    """
    alone = each_alone(encoded)
    starts = [None] * len(alone) if start is None else start
    texts = [_text(vlm, one, sites, track=track, start=own) for one, own in zip(alone, starts, strict=True)]
    return Pass(encoded, texts)


def _text(vlm: "VLM", encoded: Encoded, sites: Sequence[Site], *, track: bool, start: list[Tensor] | None) -> Text:
    states: dict[Site, Tensor] = {}
    head = vlm.model.get_submodule(vlm.family.head)
    first = encoded.n_prompt - 1

    def only_read(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0][:, first:], *given[1:])

    with contextlib.ExitStack() as hooks, torch.set_grad_enabled(track), vlm.passing():
        begin = _Start(vlm, track, start, any(site.stream != "llm" for site in sites))
        hooks.callback(begin.hooked().remove)
        for site in sites:
            hooks.callback(_Keeper(states, site, rows_of(encoded, site.stream)).hooked(vlm).remove)
        hooks.callback(head.register_forward_pre_hook(only_read).remove)
        reads = vlm.model(**encoded.inputs).logits
    missing = [str(site) for site in sites if site not in states]
    if missing or not begin.begun:
        raise WorkError(f"{vlm.name} does not compute {missing[0] if missing else 'its first block'} in a forward pass")
    return Text(states, begin.begun, reads)


def gradient(made: Pass, read: Readings) -> dict[Site, Tensor]:
    """Gradient of each example's measure at each site of a tracked pass, shaped like the states; 0 where none flows.

    Args:
        read: what one measure reads of the passes.

    Raises:
        UsageError: the measure cannot be differentiated.
    """
    with torch.enable_grad():
        (values,) = read.values(made.reads)
        total = values.sum()
    if not values.requires_grad:
        name = read.each[0].measure.metric.name
        raise UsageError(f"{name} has no gradient; logit_diff, logprob_diff and prob have one")
    # Examples do not see each other, so the gradient of their sum is each one's own.
    return made.gradient(total)


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
