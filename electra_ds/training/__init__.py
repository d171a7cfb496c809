"""Training for any model: engine, optimizers, checkpoints, loop and trackers. Nothing here depends on an objective."""

import os

import torch

# Pascal GPUs run fp16 correctly and save memory with it; DeepSpeed refuses fp16 there unless this is set.
os.environ.setdefault("DS_ALLOW_DEPRECATED_FP16", "1")
if not torch.cuda.is_available():
    # DeepSpeed reads this at import, and without it warns that it has to guess.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
