"""Drawing replacements from the generator.

Shape suffixes: M masked positions, V vocabulary.
"""

from __future__ import annotations

import torch

from electra_ds.objective.keyed_random import exponential_noise

_NOISE_BYTES = 1 << 20  # rows are handled in pieces whose noise stays in a core's cache


def sample_tokens(
    logits_MV: torch.Tensor, noise_keys_M: torch.Tensor, column_keys_V: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """int64 [M]: one token per row from softmax(logits / temperature), by Gumbel-argmax in fp32.

    Gumbel noise is -log(E) of an exponential E, keyed by `noise_keys_M` (int32), so a draw does not depend
    on how the batch is cut. ELECTRA paper, section 2; google-research/electra samples the same way.
    """
    if logits_MV.device.type == "cpu":
        rows = max(1, _NOISE_BYTES // (4 * logits_MV.shape[1]))
    else:
        rows = 4096
    samples = [
        torch.log(exponential_noise(noise_keys, column_keys_V))
        .neg_()
        .add_(logits.float(), alpha=1.0 / temperature)
        .argmax(dim=-1)
        for logits, noise_keys in zip(logits_MV.split(rows), noise_keys_M.split(rows), strict=True)
    ]
    return torch.cat(samples)
