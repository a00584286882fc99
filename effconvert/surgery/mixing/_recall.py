"""Which layers find what followed an earlier copy of a text: induction heads (Olsson et al. 2022, arXiv 2209.11895)."""
# B = texts, T = tokens, H = query heads.

from __future__ import annotations  # type imports stay lazy: `--help` must not load torch

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Set

    from effconvert.surgery._surgery import ForwardProtocol

TOKENS = 4096  # of the calibration text


def recall(forward: ForwardProtocol, layers: Set[int]) -> dict[int, float]:
    """Return for each of some layers how much of its attention its strongest induction head gives to the token after an earlier copy of the current one.

    The text is the first half of each calibration text, twice. A share of attention, from 0 to 1, mean over tokens.
    """
    import torch

    states, strongest = forward.begin(TOKENS, twice=True), {}
    with forward.bar(max(layers) + 1) as advance:
        for index in range(max(layers) + 1):
            if index in layers:
                shares = []
                for capture in forward.capture(index, states, "o"):
                    copied = capture.weights.shape[-1] // 2
                    again = torch.arange(copied, 2 * copied - 1, device=capture.weights.device)  # tokens of the second copy
                    shares.append(capture.weights[:, :, again, again - copied + 1].float().mean((0, 2)))  # [H]
                strongest[index] = float(torch.stack(shares).mean(0).max())
            states = forward.layer(index, states)
            advance(1)
    return strongest
