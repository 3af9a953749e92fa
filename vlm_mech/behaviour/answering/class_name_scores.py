"""Log-probabilities of every class name after a prompt, from one pass over the prompt.

The prompt's keys and values are kept and repeated over rows; each row continues them with the beginning of a name.
Afterwards exactly what was added is cropped away, so that no name is ever scored after another one.
"""

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded, Prompt, written
from vlm_mech.inputs.special_tokens import check_plain, ids_after

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Names:
    """Class names as the tokens that follow a prompt.

    `stems` are what has to be run to score them: every name without its last token, unless it begins another stem.
    """

    names: tuple[str, ...]
    ids: tuple[Ids, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each name."""
        return tuple(len(ids) for ids in self.ids)

    @property
    def stems(self) -> tuple[Ids, ...]:
        """The longest proper beginnings, none of which begins another."""
        proper = sorted({ids[:-1] for ids in self.ids if len(ids) > 1})
        # In sorted order whatever a stem begins comes right after it.
        pairs = itertools.pairwise([*proper, ()])
        return tuple(stem for stem, other in pairs if other[: len(stem)] != stem)

    def homes(self) -> list[list[int]]:
        """For each stem the numbers of the names that are scored in it; a name has one, or none if it is one token."""
        begun: dict[Ids, int] = {}
        stems = self.stems
        for number, stem in enumerate(stems):
            for length in range(1, len(stem) + 1):
                begun.setdefault(stem[:length], number)
        found: list[list[int]] = [[] for _ in stems]
        for place, ids in enumerate(self.ids):
            if len(ids) > 1:
                found[begun[ids[:-1]]].append(place)
        return found


def names_after(vlm: "VLM", prompts: Sequence[Prompt], names: Sequence[str]) -> Names:
    """The names' tokens as they follow the prompts.

    Raises:
        UsageError: a name without tokens, with an unknown one, that changes the prompt's own, or whose tokens depend
            on the prompt; or a special token in one, unless all prompts ask for such.
    """
    if not all(prompt.special_tokens for prompt in prompts):
        for name in names:
            check_plain(vlm, name, "class name")
    texts = list(dict.fromkeys(written(vlm, prompts)))
    found = [tuple(_ids_after(vlm, text, name) for name in names) for text in texts]
    for text, other in zip(texts, found, strict=True):
        if other != found[0]:
            raise UsageError(f"the names become other tokens after {text!r} than after {texts[0]!r}")
    for number, ids in enumerate(found[0]):
        first = found[0].index(ids)
        if first != number:
            raise UsageError(f"class names {names[first]!r} and {names[number]!r} become the same tokens")
    return Names(tuple(names), found[0])


def _ids_after(vlm: "VLM", text: str, name: str) -> Ids:
    ids = ids_after(vlm.tokenizer, text, name)
    if ids is None:
        raise UsageError(f"class name {name!r} cannot follow the prompt {text!r} as tokens of its own")
    if not ids:
        raise UsageError(f"class name {name!r} becomes no token; it cannot be scored")
    if vlm.tokenizer.unk_token_id in ids:
        raise UsageError(f"class name {name!r} is not in the model's vocabulary")
    return ids


def score_names(
    vlm: "VLM", prompts: "Sequence[Prompt] | Encoded", names: Names, *, rows: int = 128
) -> Float[Tensor, "batch n_classes"]:
    """Sum of the log-probabilities of each name's tokens after each prompt, in nats.

    Args:
        rows: rows of names run at a time, over all prompts.

    Raises:
        UsageError: fewer rows than one, or prompt and name outgrow the decoder's positions.
    """
    if rows < 1:
        raise UsageError(f"rows is {rows}; at least one is needed")
    encoded = prompts if isinstance(prompts, Encoded) else vlm.encode(prompts)
    encoded.check_room(max(names.lengths))
    with torch.no_grad(), vlm.passing():
        prefix = _prefilled(vlm, encoded)
        last = prefix.logits
        known = torch.tensor([ids[0] for ids in names.ids], device=last.device)
        found = last.float().log_softmax(-1)[:, known]
        stems, homes = names.stems, names.homes()
        if not stems:
            return found
        n_rows = min(len(stems), max(1, rows // len(encoded)))
        prefix.cache.batch_repeat_interleave(n_rows)
        for start in range(0, len(stems), n_rows):
            told = _continued(vlm, prefix, stems[start : start + n_rows], n_rows).float().log_softmax(-1)
            for stem, places in enumerate(homes[start : start + n_rows]):
                for place in places:
                    rest = torch.tensor(names.ids[place][1:], device=told.device)
                    steps = torch.arange(len(rest), device=told.device)
                    found[:, place] += told[:, stem, steps, rest].sum(-1)
    return found


@dataclass(frozen=True, eq=False)
class _Prefix:
    """What a pass over the prompts leaves: keys and values, the next token's logits, and each prompt's next position.

    `following` is None where the model counts positions by itself.
    """

    encoded: Encoded
    cache: DynamicCache
    logits: Float[Tensor, "batch vocab"]
    following: Int[Tensor, "some"] | None
    n_axes: int = 1


def _prefilled(vlm: "VLM", encoded: Encoded) -> _Prefix:
    # Without the configuration every layer keeps everything, so that what names add can be cropped away.
    cache, seen = DynamicCache(), {}
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(vlm.model.forward).parameters else {}
    decoder = vlm.model.get_submodule(vlm.family.decoder)
    hook = decoder.register_forward_pre_hook(lambda _, __, named: seen.update(named), with_kwargs=True)
    try:
        out = vlm.model(**encoded.inputs, past_key_values=cache, use_cache=True, **few)
    finally:
        hook.remove()
    positions = seen.get("position_ids")
    if positions is None:
        following = None
    elif positions.ndim == 2:
        following = positions[:, -1] + 1
    else:
        # Time, row and column of an image token count on their own; a text goes on after the largest of them.
        following = positions.amax((0, 2)) + 1
    n_axes = 1 if positions is None or positions.ndim == 2 else 3
    return _Prefix(encoded, cache, getattr(out, vlm.family.readout)[:, -1], following, n_axes)


def _continued(
    vlm: "VLM", prefix: _Prefix, stems: Sequence[Ids], n_rows: int
) -> Float[Tensor, "batch stem token vocab"]:
    """Logits after every token of every stem; the cache is left as it was."""
    width = max(len(stem) for stem in stems)
    # The last lot may be smaller: its spare rows are padding.
    filled = [*stems, *[()] * (n_rows - len(stems))]
    ids = torch.tensor([[*stem, *[0] * (width - len(stem))] for stem in filled])
    kept = torch.tensor([[1] * len(stem) + [0] * (width - len(stem)) for stem in filled])
    batch, device = len(prefix.encoded), prefix.logits.device
    mask = prefix.encoded.inputs["attention_mask"].repeat_interleave(n_rows, 0)
    given: dict[str, Any] = {"attention_mask": torch.cat([mask, kept.repeat(batch, 1).to(device)], 1)}
    if prefix.following is not None:
        following = prefix.following.expand(batch).repeat_interleave(n_rows, 0)
        given["position_ids"] = following[:, None] + torch.arange(width, device=device)
        if prefix.n_axes > 1:
            given["position_ids"] = given["position_ids"].expand(prefix.n_axes, -1, -1)
    ids = ids.repeat(batch, 1).to(device)
    out = _decoder(vlm)(input_ids=ids, past_key_values=prefix.cache, use_cache=True, **given)
    prefix.cache.crop(-width)
    return out.logits.unflatten(0, (batch, n_rows))[:, : len(stems)]


def _decoder(vlm: "VLM") -> Any:
    """What continues a text: the model itself, or its decoder where a Q-Former wants a picture in every pass."""
    return vlm.model.get_submodule(vlm.family.head.rpartition(".")[0]) if vlm.family.queries_first else vlm.model
