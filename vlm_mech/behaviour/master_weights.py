"""Descent in float32 of weights that a model keeps in half precision (master weights, arXiv 1710.03740, section 3.1).

A step of AdamW is about as large as its learning rate. At 2e-5 most steps are less than half the distance between
neighbouring bfloat16 numbers, so that a weight updated in place stays where it is. What is moved here is a float32 copy
of every such weight; the model gets its rounding after each step. Weights in float32 are moved themselves.
`classify`, `contrastive_tuning` and `debias` tune so.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm_mech.errors import WorkError

HALF = (torch.bfloat16, torch.float16)
LOSS_SCALES = (4096.0, 256.0, 16.0, 1.0)
"""What the loss of a float16 model is multiplied by, so that small gradients do not become 0; the first that overflows
nothing is taken, at every step anew, so that a step depends on nothing before it."""
OVERFLOW = "the gradients are not finite in float16; bfloat16 or float32 has the range that they need"


class Descent:
    """AdamW with clipped gradients (norm 1) on parameters of any floating type.

    `moved` are the tensors that the optimiser `adam` moves, in the order of the parameters: a float32 master where a
    parameter is in half precision, the parameter itself elsewhere.

    Args:
        dtype: in what the model computes.
        factors: for each parameter what its learning rate is multiplied by; 1 by default.
    """

    def __init__(
        self,
        trained: Iterable[nn.Parameter],
        *,
        dtype: torch.dtype,
        rate: float,
        weight_decay: float = 0.0,
        factors: Sequence[float] = (),
    ) -> None:
        self.trained: Sequence[nn.Parameter] = list(trained)
        self.moved: Sequence[Tensor] = [_master(parameter) for parameter in self.trained]
        by_factor: dict[float, list[Tensor]] = {}
        for tensor, factor in zip(self.moved, factors or [1.0] * len(self.moved), strict=True):
            by_factor.setdefault(factor, []).append(tensor)
        groups = [{"params": some, "lr": rate * factor, "factor": factor} for factor, some in by_factor.items()]
        self.adam = torch.optim.AdamW(groups, lr=rate, weight_decay=weight_decay)
        self._scales = LOSS_SCALES if dtype == torch.float16 else (1.0,)

    def step(self, loss: Float[Tensor, ""], *, rate: float | None = None) -> None:
        """One step down a finite loss, at that learning rate if one is given.

        Raises:
            WorkError: the gradients of a float16 model are not finite.
        """
        self._move(self._backward(loss), rate)

    @torch.enable_grad()
    def step_over(self, parts: Sequence[Callable[[], Float[Tensor, ""]]], *, rate: float | None = None) -> float:
        """One step down the sum of several losses, each computed and forgotten before the next; returns the sum.

        Raises:
            WorkError: a loss is not finite, or the gradients of a float16 model are not.
        """
        for scale in self._scales:
            self.forget_gradients()
            total = 0.0
            for part in parts:
                loss = part()
                total += loss.item()
                if not math.isfinite(total):
                    raise WorkError(f"the loss is {total}; a smaller learning rate may hold")
                (loss * scale).backward()
            if self._finite():
                self._move(scale, rate)
                return total
        raise WorkError(OVERFLOW)

    def _move(self, scale: float, rate: float | None) -> None:
        """One step along the gradients, which are `scale` times too large."""
        for group in self.adam.param_groups:
            group["lr"] = group["lr"] if rate is None else rate * group["factor"]
        pairs = list(zip(self.trained, self.moved, strict=True))
        for parameter, master in pairs:
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float() / scale
            elif parameter.grad is not None and scale != 1:
                parameter.grad /= scale
        nn.utils.clip_grad_norm_(self.moved, 1.0)
        self.adam.step()
        with torch.no_grad():
            for parameter, master in pairs:
                if master is not parameter:
                    parameter.copy_(master)

    @torch.enable_grad()
    def _backward(self, loss: Float[Tensor, ""]) -> float:
        """Gradients of the loss, times the factor that is returned."""
        for scale in self._scales:
            self.forget_gradients()
            (loss if scale == 1 else loss * scale).backward(retain_graph=scale != self._scales[-1])
            if self._finite():
                return scale
        raise WorkError(OVERFLOW)

    def _finite(self) -> bool:
        found = [each.grad for each in self.trained if each.grad is not None]
        return len(self._scales) == 1 or all(bool(torch.isfinite(each).all()) for each in found)

    def forget_gradients(self) -> None:
        """Frees the gradients, for instance at the end."""
        for each in (*self.trained, *self.moved):
            each.grad = None


def _master(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().float().requires_grad_() if parameter.dtype in HALF else parameter
