"""Batches built ahead of the step that takes them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, Protocol


class Builder(Protocol):
    """Builds the batch of any step, of whatever kind."""

    def build(self, step: int) -> Any: ...


def prefetched(builder: Builder, first_step: int, stop_step: int) -> Iterator[tuple[int, Any]]:
    """(step, batch) in order, built one or two steps ahead in a thread."""
    ready: queue.Queue[tuple[int, Any] | BaseException | None] = queue.Queue(maxsize=2)
    stopped = threading.Event()

    def put(item: tuple[int, Any] | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for step in range(first_step, stop_step):
                if stopped.is_set():
                    return
                put((step, builder.build(step)))
            put(None)
        except BaseException as error:  # handed to the consumer
            put(error)

    thread = threading.Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
