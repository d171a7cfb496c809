"""The CPU-seconds of each test, its processes included.

A test without the marker `slow` or `nightly` may take BUDGET_S of a quiet core; one that takes more fails the session.
CPU-seconds grow to two or three times on cores that are shared or slow, so a loop of known length is timed right after
such a test. Fixtures are left out, since the first test that needs a shared one would pay for all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from pathlib import Path

import pytest

BUDGET_S = 5.0
_SHOWN = 25
_CALL = "cpu_s"
_ON_A_QUIET_CORE = "quiet_s"
_LOOP_S = 0.11
"""The time of `_loop` on the quiet core for which the budget was set."""
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


def _loop() -> float:
    """Return the CPU-seconds that a loop of known length takes now."""
    started = time.process_time()
    for _ in range(20):
        sum(number * number for number in range(100_000))
    return time.process_time() - started


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    before = _cpu_s()
    try:
        return (yield)
    finally:
        cost = _cpu_s() - before
        slowness = max(1.0, _loop() / _LOOP_S) if cost > BUDGET_S else 1.0
        item.user_properties += [(_CALL, cost), (_ON_A_QUIET_CORE, cost / slowness)]


class Costs:
    """Collects the costs of a session's tests, on the process that reports them."""

    def __init__(self) -> None:
        self.by_test: dict[str, float] = {}
        self.over: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown":
            return
        measured = dict(report.user_properties)
        self.by_test[report.nodeid] = float(measured.get(_CALL, 0.0))  # type: ignore[arg-type]
        on_a_quiet_core = float(measured.get(_ON_A_QUIET_CORE, 0.0))  # type: ignore[arg-type]
        if on_a_quiet_core > BUDGET_S and not {"slow", "nightly"} & report.keywords.keys():
            self.over[report.nodeid] = on_a_quiet_core

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.over and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for test, cost in self.over.items():
            terminalreporter.line(
                f"ERROR {test} took {cost:.1f} CPU-seconds of a quiet core, more than the {BUDGET_S:.0f} of a test that"
                f" is not marked as slow: make it cheaper, or mark it.", red=True,
            )  # fmt: skip
        if len(self.by_test) < _SHOWN:
            return
        total = sum(self.by_test.values()) / 60
        terminalreporter.section(f"{total:.1f} CPU-minutes without fixtures; the most expensive tests, in CPU-seconds")
        for test in sorted(self.by_test, key=lambda test: -self.by_test[test])[:_SHOWN]:
            terminalreporter.line(f"{self.by_test[test]:7.1f}  {test}")
