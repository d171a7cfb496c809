"""Training of any model: engine, optimizers, checkpoints, loop and trackers. Knows no objective."""

import os

import torch

# Pascal cards run fp16 correctly and save memory by it; DeepSpeed refuses it there unless told so.
os.environ.setdefault("DS_ALLOW_DEPRECATED_FP16", "1")
if not torch.cuda.is_available():
    # Read by deepspeed at import; without it, it warns that it has to guess.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
