"""Tuned lens: one affine translator a site, so that the lens says what the model will say in the end.

After Belrose et al. (2023, arXiv 2303.08112): `W_U norm(h + A h + b)` with A and b from zero, trained by the divergence
of the lens from the model's own final distribution at the same token. Ours adds early stopping on held-out prompts, and
keeps a translator only where it is better there than none.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from vlm_mech.architectures.site import Site, listed_sites
from vlm_mech.architectures.traced_model import check_decoder, check_gradients
from vlm_mech.architectures.weights import device_of
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Span
from vlm_mech.methods.lens.data import MOST_LOGITS, SITES, states_of, unnamed
from vlm_mech.models.readout import Readout
from vlm_mech.results import metrics
from vlm_mech.results.result import Metric, Result

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Optimiser = Literal["adam", "sgd"]
WEIGHTS, RECORD = "tuned_lens.safetensors", "tuned_lens.json"
SMALLEST_GAIN = 1e-6
"""Nats by which held-out divergence must fall for a translator to count as better."""


@dataclass(frozen=True)
class LensTraining:
    """How translators are trained.

    `sgd` with `learning_rate` 0.1, `momentum` 0.9, `weight_decay` 1e-3 and 250 steps is what the original code does
    (with far larger batches). The rate falls to zero linearly. Every `check_every` steps the held-out divergence is
    taken; after `patience` checks without a gain training ends.
    """

    optimiser: Optimiser = "adam"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    n_steps: int = 250
    batch_tokens: int = 256
    check_every: int = 25
    patience: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimiser not in ("adam", "sgd"):
            raise UsageError(f"optimiser {self.optimiser!r} is not known; use adam or sgd")
        for name in ("learning_rate", "n_steps", "batch_tokens", "check_every", "patience"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be above zero")


@dataclass(frozen=True, eq=False)
class MadeOf:
    """What translators were trained on: prompts for training and for stopping, the tokens, and prompts a pass."""

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    span: Span
    batch_size: int


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Translators of sites, and what is known of their training.

    `record` holds the model, the training, fingerprints of the prompts used (for training and for stopping), and for
    each site the held-out divergence in nats without (`plain`) and with the translator (`tuned`). At the last
    `resid_post` the tuned lens is the plain one.
    """

    weights: dict[Site, Float[Tensor, "d_model d_model"]]
    biases: dict[Site, Float[Tensor, " d_model"]]
    record: dict[str, Any]
    made_of: MadeOf | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that have translators."""
        return tuple(self.weights)

    def translate(self, site: Site, hidden: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """`h + A h + b`, in the data type of the states; the states themselves at the last `resid_post`."""
        if site not in self.weights:
            return hidden
        weight, bias = (each[site].to(hidden.device) for each in (self.weights, self.biases))
        return _translated(hidden.float(), weight, bias).to(hidden.dtype)

    def check(self, vlm: "VLM", prompts: Sequence[Prompt], sites: Sequence[Site], *, normed: bool) -> None:
        """Raise `UsageError` unless the translators belong to the model and the prompts had no part in their making."""
        if not normed:
            raise UsageError("a tuned lens is trained through the final norm; normed=False does not go with it")
        if lacking := [name for name in ("model", "used") if name not in self.record]:
            raise UsageError(
                f"the record of the tuned lens has no {' and no '.join(map(repr, lacking))}, so that it fits no model; "
                "train_tuned_lens and TunedLens.load give lenses that have"
            )
        if unnamed(vlm) != self.record["model"]:
            raise UsageError(f"the tuned lens was made for {self.record['model']}, not for {unnamed(vlm)}")
        last = _last(vlm)
        lacking = [str(site) for site in sites if site not in self.weights and site != last]
        if lacking:
            raise UsageError(f"the tuned lens has no translator for {', '.join(lacking)}")
        used = set(self.record["used"])
        seen = sum(fingerprint(prompt) in used for prompt in prompts)
        if seen:
            raise UsageError(f"{seen} of {len(prompts)} prompts had a part in training this lens; judge it on others")

    def save(self, folder: str | Path) -> None:
        """Writes the translators (safetensors) and the record (json).

        Raises:
            UsageError: the folder holds a tuned lens already.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / WEIGHTS).exists():
            raise UsageError(f"{str(folder)!r} holds a tuned lens already")
        tensors = {f"{site}.{name}": each[site].contiguous() for site in self.sites for name, each in self._named()}
        save_file(tensors, folder / WEIGHTS)
        sites = [[site.name, site.layer] for site in self.sites]
        (folder / RECORD).write_text(json.dumps({"sites": sites, **self.record}, indent=1), encoding="utf-8")

    def _named(self) -> tuple[tuple[str, dict[Site, Tensor]], ...]:
        return ("weight", self.weights), ("bias", self.biases)

    @classmethod
    def load(cls, folder: str | Path) -> "TunedLens":
        """The tuned lens that `save` left in the folder.

        Raises:
            UsageError: there is none.
        """
        folder = Path(folder)
        if not (folder / WEIGHTS).is_file() or not (folder / RECORD).is_file():
            raise UsageError(f"there is no tuned lens in {str(folder)!r}")
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        sites = [Site(name, layer) for name, layer in record.pop("sites")]
        tensors = load_file(folder / WEIGHTS)
        weights, biases = ({site: tensors[f"{site}.{name}"] for site in sites} for name in ("weight", "bias"))
        return cls(weights, biases, record)


def fingerprint(prompt: Prompt) -> str:
    """A hash of the images of a prompt, of its text where it has none.

    Under causal attention image tokens do not see the question after them: another question about an image that was
    trained on is no new example.
    """
    digest = hashlib.sha256()
    for image in map(load_image, prompt.images):
        digest.update(repr(image.size).encode() + image.tobytes())
    if not prompt.images:
        begun = () if prompt.prefix is None else (prompt.prefix,)
        digest.update(repr((prompt.question, prompt.system, prompt.text, *begun)).encode())
    return digest.hexdigest()


def _last(vlm: "VLM") -> Site:
    return Site("llm.resid_post", vlm.n_layers("llm") - 1)


def _translated(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return hidden + hidden @ weight.mT + bias


def train_tuned_lens(
    vlm: "VLM",
    train: Sequence[Prompt],
    held_out: Sequence[Prompt],
    sites: Site | Sequence[Site],
    span: Span,
    *,
    training: LensTraining | None = None,
    batch_size: int = 8,
) -> TunedLens:
    """Translators for the sites, trained on every token of the span and stopped by the held-out prompts.

    The states of all sites and prompts are held in memory; logits of a batch of tokens only.

    Args:
        span: `all` for every token, or for instance `question`, `image`.
        training: optimiser, steps and when to stop; `LensTraining()` by default.
        batch_size: prompts per forward pass.

    Raises:
        UsageError: an image (or text without image) is in both sets of prompts, a site that the head cannot read, the
            last `resid_post` (which needs no translator), or an empty span.
    """
    check_decoder(vlm, "train_tuned_lens")
    check_gradients("train_tuned_lens")
    training, sites = training or LensTraining(), listed_sites(sites, "train_tuned_lens")
    used = [{fingerprint(prompt) for prompt in prompts} for prompts in (train, held_out)]
    if not all(used) or used[0] & used[1]:
        raise UsageError(
            f"{len(used[0])} training and {len(used[1])} held-out images or texts, {len(used[0] & used[1])} in both; "
            "none may be, and each set needs one"
        )
    wrong = [str(site) for site in sites if site.name not in SITES or site == _last(vlm)]
    if wrong or not sites:
        raise UsageError(f"no translator can be trained for {', '.join(wrong) or 'no site'}")
    for site in sites:
        vlm.check_site(site)
    states = [_gathered(vlm, prompts, (*sites, _last(vlm)), span, batch_size) for prompts in (train, held_out)]
    readout, device = vlm.readout, device_of(vlm.readout.head)
    made: dict[Site, tuple[Tensor, Tensor]] = {}
    held: dict[str, dict[str, float]] = {}
    for site in tqdm(sites, desc="tuned lens", disable=None):
        seen = [_Tokens(each[site].to(device).float(), each[_last(vlm)].to(device)) for each in states]
        made[site], held[str(site)] = _trained(readout, seen[0], seen[1], training)
    counts = {"n_train": len(train), "n_held_out": len(held_out), "n_tokens": len(states[0][sites[0]])}
    about = {"model": unnamed(vlm), "training": dataclasses.asdict(training), "span": repr(span), **counts}
    record = {**about, "held_out": held, "used": sorted(used[0] | used[1])}
    weights, biases = ({site: made[site][number].cpu() for site in sites} for number in range(2))
    return TunedLens(weights, biases, record, MadeOf(tuple(train), tuple(held_out), span, batch_size))


def retrained(tuned: TunedLens, vlm: "VLM") -> TunedLens:
    """A tuned lens of another model, trained as this one was: on the same prompts, tokens and sites, with its seed.

    Raises:
        UsageError: the lens comes from a file, which keeps fingerprints of its prompts alone.
    """
    if tuned.made_of is None:
        raise UsageError("the tuned lens comes from a file, which keeps no training prompts to train another one on")
    of, training = tuned.made_of, LensTraining(**tuned.record["training"])
    how: dict[str, Any] = {"training": training, "batch_size": of.batch_size}
    return train_tuned_lens(vlm, of.train, of.held_out, tuned.sites, of.span, **how)


def _gathered(
    vlm: "VLM", prompts: Sequence[Prompt], sites: Sequence[Site], span: Span, batch_size: int
) -> dict[Site, Tensor]:
    batches = [states for _, states in states_of(vlm, tuple(prompts), sites, span, batch_size=batch_size)]
    return {site: torch.cat([states[site] for states in batches]) for site in sites}


@dataclass(frozen=True, eq=False)
class _Tokens:
    """States of some tokens at a site, in float32, and after the last block."""

    states: Float[Tensor, "token d_model"]
    finals: Float[Tensor, "token d_model"]

    def __len__(self) -> int:
        return len(self.states)


def _trained(
    readout: Readout, train: _Tokens, held_out: _Tokens, training: LensTraining
) -> tuple[tuple[Tensor, Tensor], dict[str, float]]:
    """Weight and bias that were best on the held-out tokens, and the divergences there without and with them."""
    width = train.states.shape[1]
    weight, bias = train.states.new_zeros(width, width), train.states.new_zeros(width)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    best = [each.detach().clone() for each in parameters]
    plain = lowest = _divergence(readout, held_out, weight, bias)
    optimiser, decay = _optimiser(parameters, training)
    generator = torch.Generator().manual_seed(training.seed)
    waited = 0
    for step in range(1, training.n_steps + 1):
        chosen = torch.randint(len(train), (training.batch_tokens,), generator=generator).to(weight.device)
        with torch.no_grad():
            final = readout(train.finals[chosen])
        with torch.enable_grad():
            ours = readout(_translated(train.states[chosen], weight, bias).to(train.finals.dtype))
            distance = metrics.kl(ours, final).mean()
        # Of the translator only: the model's own parameters must gather nothing.
        gradients = torch.autograd.grad(distance, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        decay.step()
        if step % training.check_every and step != training.n_steps:
            continue
        now = _divergence(readout, held_out, weight, bias)
        waited = 0 if now < lowest - SMALLEST_GAIN else waited + 1
        if waited == 0:
            lowest, best = now, [each.detach().clone() for each in parameters]
        if waited == training.patience or math.isnan(now):
            break
    return (best[0], best[1]), {"plain": plain, "tuned": lowest, "n_tokens": len(held_out)}


def _optimiser(
    parameters: list[Tensor], training: LensTraining
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    shared = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optimiser == "sgd":
        made = torch.optim.SGD(parameters, momentum=training.momentum, nesterov=training.momentum > 0, **shared)
    else:
        made = torch.optim.Adam(parameters, **shared)
    falling = torch.optim.lr_scheduler.LinearLR(made, start_factor=1.0, end_factor=1e-8, total_iters=training.n_steps)
    return made, falling


@torch.no_grad()
def _divergence(readout: Readout, tokens: _Tokens, weight: Tensor, bias: Tensor) -> float:
    """Mean over tokens of D(final || lens), in nats."""
    step = max(1, MOST_LOGITS // readout.n_words)
    total = 0.0
    for some, final in zip(tokens.states.split(step), tokens.finals.split(step), strict=True):
        ours = readout(_translated(some, weight, bias).to(final.dtype))
        total += metrics.kl(ours, readout(final)).sum().item()
    return total / len(tokens)


def compare_lenses(
    vlm: "VLM", tuned: TunedLens, prompts: Sequence[Prompt], span: Span, *, batch_size: int = 8
) -> Result:
    """How far each lens is from the model's final distribution: metric `kl` (nats), the baseline is the plain lens.

    One row per prompt and site, the mean over the tokens of the span.

    Args:
        batch_size: prompts per forward pass.

    Raises:
        UsageError: a prompt had a part in training the lens, or the lens belongs to another model.
    """
    check_decoder(vlm, "compare_lenses")
    prompts, last = tuple(prompts), _last(vlm)
    tuned.check(vlm, prompts, tuned.sites, normed=True)
    readout = vlm.readout
    rows = []
    for tokens, states in states_of(vlm, prompts, (*tuned.sites, last), span, batch_size=batch_size):
        examples = torch.tensor([token.example for token in tokens])
        for site in tuned.sites:
            weight, bias = tuned.weights[site].to(vlm.device), tuned.biases[site].to(vlm.device)
            for example in examples.unique().tolist():
                own = examples == example
                some = _Tokens(states[site][own].float(), states[last][own])
                values = {"kl": _divergence(readout, some, weight, bias)}
                values["kl_baseline"] = _divergence(readout, some, torch.zeros_like(weight), torch.zeros_like(bias))
                rows.append({"example": str(example), "site": str(site), **values})
    metric = Metric("kl", "nats", "D(final || lens), mean over the tokens of the span; baseline: the plain lens")
    return Result("tuned lens", pd.DataFrame(rows), ("site",), (metric,))
