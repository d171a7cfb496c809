"""A custom optimizer: Lion (Chen et al. 2023, algorithm 2)."""

from __future__ import annotations

from electra_ds import UpdateRule


class Lion(UpdateRule):
    """Use a learning rate several times smaller than AdamW's, and a weight decay larger by the same factor."""

    def update(self, weight, gradient, first, second, *, learning_rate, betas, weight_decay, step):
        direction = first.lerp(gradient, 1 - betas[0]).sign_()
        weight.mul_(1 - learning_rate * weight_decay).sub_(direction, alpha=learning_rate)
        first.lerp_(gradient, 1 - betas[1])
