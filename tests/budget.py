"""What each test costs in CPU-seconds, its processes included, whatever else the machine does."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

BUDGET_S = 5.0
"""What a test may cost that is not marked `slow` or `nightly`, without the fixtures that it shares."""
_SHOWN = 25
_KEY = "cpu_s"


def _cpu_s() -> float:
    """Of this process and all below it, the ended ones as well."""
    me = psutil.Process()
    spent = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            spent += sum(process.cpu_times()[:4])  # user, system, and those of children that were waited for
        except psutil.NoSuchProcess:
            continue
    return spent


def _measured(item: pytest.Item, phase: str) -> Iterator[None]:
    before = _cpu_s()
    result = yield
    item.user_properties.append((f"{_KEY} {phase}", round(_cpu_s() - before, 2)))
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    return (yield from _measured(item, "setup"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    return (yield from _measured(item, "call"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    return (yield from _measured(item, "teardown"))
