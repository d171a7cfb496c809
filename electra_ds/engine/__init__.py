"""Engines that run the joint step."""

import os

import torch

if not torch.cuda.is_available():
    # Read by deepspeed at import; without it, it warns that it has to guess.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
