"""From the residual stream to logits, as the model itself goes: final norm, head, and whatever it does to the logits.

Some models squash or scale what the head gives; which do cannot be told from the configuration alone (PaliGemma applies
the soft cap that its decoder's configuration names, Gemma-3 with an image tower does not). So the model is asked: its
own logits decide.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import WorkError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.plan import Plan
from vlm_mech.interventions.trace import carry_out

ROUNDING = 256
"""Multiples of the data type's precision by which two ways to the same logits may differ, relative to the largest."""
N_POSITIONS = 8
"""Positions at which the two are compared."""
ROWS = 4096
"""Rows of the head whose norms are taken at once."""


@dataclass(frozen=True, eq=False)
class Readout:
    """Final norm and head of a model, then `scale` times the logits, then a soft cap `cap tanh(logits / cap)`."""

    norm: nn.Module
    head: nn.Module
    n_words: int
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Float[Tensor, "token d_model"], *, normed: bool = True) -> Float[Tensor, "token vocab"]:
        """Logits in float32 of states of the residual stream, which must not have been through the final norm.

        Args:
            normed: whether the final norm is applied, once; without it the head reads the raw states.
        """
        states = hidden[None]
        logits = self.head(self.norm(states) if normed else states)[0].float() * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    @property
    def size(self) -> float:
        """Norm of the largest row of the head times that of a normed state: what a logit, a scalar product of such two,
        is rounded by goes with it, however small the logit; 0 where weights are not there as numbers."""
        rows, scales = (getattr(part, "weight", None) for part in (self.head, self.norm))
        if any(each is None or not each.is_floating_point() or each.is_meta for each in (rows, scales)):
            return 0.0
        assert rows is not None and scales is not None, "both are there"
        largest = max(part.float().norm(dim=1).max().item() for part in rows.detach().split(ROWS))
        return largest * scales.detach().float().norm().item() * abs(self.scale)

    @property
    def told(self) -> dict[str, Any]:
        """What was found of it, as JSON has it."""
        return {"n_words": self.n_words, "scale": self.scale, "cap": self.cap}


def known_readout(vlm: TracedModel, told: Any) -> Readout | None:
    """The read-out of a model of which this was remembered; None where it cannot be what `Readout.told` was."""
    if not isinstance(told, dict) or set(told) != {"n_words", "scale", "cap"}:
        return None
    n_words, scale, cap = told["n_words"], told["scale"], told["cap"]
    numbers = isinstance(n_words, int) and isinstance(scale, float) and isinstance(cap, float | None)
    return Readout(*_norm_and_head(vlm), n_words, scale, cap) if numbers else None


def readout_of(vlm: TracedModel, prompt: Prompt) -> Readout:
    """The read-out with which the last block's output gives the model's own logits at the prompt's last positions.

    The logits of its last `N_POSITIONS` positions are compared, so a few words are enough.

    Raises:
        WorkError: neither a plain head, nor one with the configured soft cap or a factor, gives them.
    """
    last = Site("llm.resid_post", vlm.n_layers("llm") - 1)
    states, logits, _ = carry_out(vlm, vlm.encode([prompt]), Plan({}, {}), (last,))
    assert logits is not None, "the pass runs to its end"
    hidden, expected = states[last][0, -N_POSITIONS:], logits[0, -N_POSITIONS:].float()
    limit = ROUNDING * torch.finfo(vlm.dtype).eps * max(1.0, expected.abs().max().item())
    with torch.no_grad():
        configured, factor = _candidates(vlm, hidden, expected)
        # A factor fits rounding too: it is for where nothing that is configured will do.
        for some in (configured, (factor,)):
            error, found = min(((_error(each(hidden), expected), each) for each in some), key=lambda pair: pair[0])
            if error <= limit:
                return found
    raise WorkError(
        f"{vlm.name}: final norm and head do not give the model's own logits (largest difference {error:.3g}); "
        "something comes between that the lens does not know"
    )


def _error(logits: Tensor, expected: Tensor) -> float:
    return (logits.to(expected.device) - expected).abs().max().item()


def _candidates(
    vlm: TracedModel, hidden: Float[Tensor, "pos d_model"], expected: Float[Tensor, "pos vocab"]
) -> tuple[tuple[Readout, ...], Readout]:
    """A plain head, and one with the configured soft cap where there is one; and one with the factor that fits best."""
    norm, head = _norm_and_head(vlm)
    n_words = expected.shape[-1]
    plain = Readout(norm, head, n_words)
    logits = plain(hidden).to(expected.device).double()
    scale = ((logits * expected).sum() / logits.square().sum()).item()
    cap = getattr(vlm.config.get_text_config(), "final_logit_softcapping", None)
    capped = () if cap is None else (Readout(norm, head, n_words, cap=float(cap)),)
    return (plain, *capped), Readout(norm, head, n_words, scale=scale)


def _norm_and_head(vlm: TracedModel) -> tuple[nn.Module, nn.Module]:
    after = vlm.family.llm.after
    if after is None:
        raise WorkError(f"{vlm.family.name} names no final norm of its decoder")
    return vlm.model.get_submodule(after), vlm.model.get_submodule(vlm.family.head)
