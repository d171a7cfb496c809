"""The CPU-seconds of each test, its processes included, which do not depend on what else the machine does.

A test without the marker `slow` or `nightly` should take no more than BUDGET_S; the summary counts those that do.
Fixtures are left out, since the first test that needs a shared one would pay for all.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

BUDGET_S = 5.0
_SHOWN = 25
_CALL = "cpu_s"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def _cpu_s() -> float:
    """Return the CPU-seconds of this process and of all that it has started, the ended ones included.

    Those of the process that is forked (tests/forks.py) are left out, since the first test with a fork would pay for
    its imports; its forks count.
    """
    spent, left = 0.0, [(os.getpid(), False)]
    while left:
        pid, is_child = left.pop()
        try:
            of_process = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
            is_forked = is_child and b"multiprocessing.forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
            below = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        except OSError:  # it has ended, or this is not Linux
            continue
        spent += sum(map(int, of_process[2 if is_forked else 0 :])) / _TICKS_PER_S  # user and system; then children's
        left += [(int(child), pid == os.getpid()) for children in below for child in children.split()]
    return spent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    before = _cpu_s()
    try:
        return (yield)
    finally:
        item.user_properties.append((_CALL, _cpu_s() - before))


class Costs:
    """Collects the costs of a session's tests, on the process that reports them."""

    def __init__(self) -> None:
        self.by_test: dict[str, float] = {}
        self.over: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown":
            return
        cost = float(dict(report.user_properties).get(_CALL, 0.0))  # type: ignore[arg-type]
        self.by_test[report.nodeid] = cost
        if cost > BUDGET_S and not {"slow", "nightly"} & report.keywords.keys():
            self.over.add(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if len(self.by_test) < _SHOWN:
            return
        total = sum(self.by_test.values()) / 60
        terminalreporter.section(f"{total:.1f} CPU-minutes without fixtures; the most expensive tests, in CPU-seconds")
        for test in sorted(self.by_test, key=lambda test: -self.by_test[test])[:_SHOWN]:
            terminalreporter.line(f"{self.by_test[test]:7.1f}  {test}")
        terminalreporter.line(
            f"{len(self.over)} tests that are not marked as slow took more than {BUDGET_S:.0f} CPU-seconds"
        )
