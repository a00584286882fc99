"""A loss over the logits of many tokens, a few at a time: no logits are kept for the gradients, nor computed twice."""
# N = tokens, M = hidden width, C = tokens at a time.

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS = 256  # C
Loss = Callable[[Tensor, slice], Tensor]  # hidden states [C, M] of some rows -> the sum of their losses


def summed(loss: Loss, hidden: Tensor, parameters: Sequence[Tensor], again: bool = False) -> Tensor:
    """Return the sum of a loss over all rows; its gradients are computed with it, piece by piece.

    Args:
        loss: of a few rows.
        hidden: hidden states, [N, M].
        parameters: what else the loss depends on, and gradients go to.
        again: compute the loss a second time for its gradients instead. FSDP needs that: it takes a gradient of the head for the end of the step.
    """
    if again:
        pieces: list[Any] = [checkpoint(loss, hidden[at : at + ROWS], slice(at, at + ROWS), use_reentrant=False) for at in range(0, len(hidden), ROWS)]
        return torch.stack(pieces).sum()
    result: Tensor = _InPieces.apply(  # type: ignore[no-untyped-call]
        loss, torch.is_grad_enabled(), hidden, *parameters
    )
    return result


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Loss, enabled: bool, hidden: Tensor, *parameters: Tensor) -> Tensor:
        wanted = [enabled and wanted for wanted in ctx.needs_input_grad[2:]]
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients = [torch.zeros_like(tensor) if want else None for tensor, want in zip((hidden, *parameters), wanted, strict=True)]
        for at in range(0, len(hidden), ROWS):
            rows = slice(at, at + ROWS)
            with torch.set_grad_enabled(any(wanted)):
                own = hidden[rows].detach().requires_grad_(wanted[0])
                part = loss(own, rows)
            total += part.detach()
            sources = [tensor for tensor, want in zip((own, *parameters), wanted, strict=True) if want]
            own_parts = iter(torch.autograd.grad(part, sources, allow_unused=True) if sources and part.requires_grad else ())
            for index, gradient in enumerate(gradients):
                if gradient is not None and (own_part := next(own_parts, None)) is not None:
                    (gradient[rows] if index == 0 else gradient).add_(own_part)
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        """Scale the gradients; they are given away, so there is no second time."""
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if gradient is None else gradient.mul_(outer[0]) for gradient in gradients)
