"""How many trials there is room for, on one machine or on a cluster's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from electra_ds.config.hardware import driver_gpus
from electra_ds.core.errors import ConfigError
from electra_ds.sweep.spec import Resources


@dataclass(frozen=True)
class Node:
    cpus: int
    gpus: int

    def places(self, resources: Resources) -> int:
        """Workers of a trial that it has room for at once; a share of a GPU is a share of one card."""
        places = self.cpus // resources.cpus
        return min(places, self.gpus * int(1 / resources.gpus + 1e-9)) if resources.gpus else places


def this_machine() -> Node:
    """As far as the system and the GPUs' driver tell; CUDA_VISIBLE_DEVICES hides cards."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = len(driver_gpus()) if visible is None else len([each for each in visible.split(",") if each.strip()])
    return Node(len(os.sched_getaffinity(0)), gpus)


def trials_at_once(resources: Resources, nodes: Sequence[Node]) -> int:
    """Raises ConfigError if there is no room for one."""
    places = sum(node.places(resources) for node in nodes)
    if places < resources.workers:
        raise ConfigError(_no_room(resources, nodes))
    return places // resources.workers


def _no_room(resources: Resources, nodes: Sequence[Node]) -> str:
    wanted = f"{resources.cpus} CPU{'s' if resources.cpus > 1 else ''}"
    if resources.gpus:
        wanted += f" and {resources.gpus:g} GPU"
    workers = f"{resources.workers} workers of {wanted} each" if resources.workers > 1 else wanted
    where = "this machine has" if len(nodes) == 1 else f"the {len(nodes)} nodes have at most"
    there = (
        f"{max((node.cpus for node in nodes), default=0)} CPUs and {max((node.gpus for node in nodes), default=0)} GPUs"
    )
    change = (
        "resources.gpus=0, to train on CPUs"
        if resources.gpus and not any(node.gpus for node in nodes)
        else ("resources.cpus=1" if resources.cpus > 1 else "resources.workers=1")
    )
    return f"A trial takes {workers}, and {where} {there}. Lower it: --set {change}"
