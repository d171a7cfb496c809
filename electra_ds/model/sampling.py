"""Drawing replacements from the generator.

Shape suffixes: M masked positions, V vocabulary.
"""

from __future__ import annotations

import torch

from electra_ds.core.keyed_random import exponential_noise

CPU_NOISE_BYTES = 1 << 20  # rows are handled in pieces whose noise stays in a core's cache


def sample_tokens(weights_MV: torch.Tensor, noise_keys_M: torch.Tensor, column_keys_V: torch.Tensor) -> torch.Tensor:
    """int64 [M]: one token per row, with probability proportional to its weight (fp32, such as a softmax).

    An exponential race: of Exp(1) variates E keyed by `noise_keys_M` (int32) the largest weight / E wins. That is
    Gumbel-argmax, log(weight) - log(E), without its logarithm; so a draw does not depend on how the batch is cut, and
    rounding almost never changes it. ELECTRA paper, section 2; google-research/electra samples by Gumbel-argmax.
    """
    rows = len(weights_MV)
    if weights_MV.device.type == "cpu":
        rows = max(1, CPU_NOISE_BYTES // (4 * weights_MV.shape[1]))
    samples = []
    for weights, noise_keys in zip(weights_MV.split(rows or 1), noise_keys_M.split(rows or 1), strict=True):
        noise = exponential_noise(noise_keys, column_keys_V)
        samples.append(torch.div(weights, noise, out=noise).max(dim=-1).indices)  # on a CPU thrice as fast as argmax
    return torch.cat(samples)
