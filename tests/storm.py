"""Kill a pretraining run again and again, and see that nothing is ever lost.

    python -m tests.storm --kills 200 --ranks 1 --seed 0 --out faults.json

Small runs with dropout are killed with `kill -9` and resumed until that many kills have been made. Each run continues
until it is finished; then its metrics and its last checkpoint must equal those of a run that nothing disturbed, bit for
bit, and after every kill each published checkpoint must be complete and `latest` name one. Ctrl-C and SIGTERM end it
with the counts so far.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from electra_ds.config.run_directory import RunDirectory, read_metrics
from electra_ds.config.run_record import versions
from electra_ds.training.checkpoint import CheckpointFolder, load_checkpoint, verify_checkpoint
from tests.forks import PHASES, Moment, Started, start
from tests.helpers import REPOSITORY, SMALL, write_corpus
from tests.launching import ENVIRONMENT, rank_environments

STEPS, SAVE_EVERY, KEEP = 60, 3, 2
# A rank whose peer was killed has to end by itself; the machine may be busy.
ALONE_S = 45.0
_RATES = {"tokens_per_s", "mfu"}


def arguments_for(store: Path, run: Path, ranks: int, *more: str) -> list[str]:
    """What starts a run of the small model, with dropout, that saves often."""
    return [
        "--ds-config", str(REPOSITORY / "ds_configs" / ("cpu.json" if ranks == 1 else "zero1.json")),
        "--recipe", "tiny", "--data", str(store), "--run-dir", str(run), "--threads", "1", "--log-every", "1",
        "--save-every", str(SAVE_EVERY), "--keep", str(KEEP), "--eval-every", "20", "--eval-windows", "16", *more,
        "--set", *SMALL, "model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1",
        f"schedule.total_steps={STEPS}", "schedule.warmup_steps=6",
    ]  # fmt: skip


def start_run(store: Path, run: Path, log: Path, ranks: int, *more: str, **how: Any) -> Started:
    """Do what a user does: start the run, or resume it once there is one."""
    is_there = RunDirectory(run).exists() or any((run / "checkpoints").glob("step-*"))
    arguments = ["--resume", str(run), *more] if is_there else arguments_for(store, run, ranks, *more)
    return start(["pretrain", *arguments], run, log, rank_environments(ranks), **how)


def make_store(folder: Path) -> Path:
    """A token store of a small corpus, made by a process of its own."""
    corpus, store = write_corpus(folder / "corpus"), folder / "store"
    command = [sys.executable, str(REPOSITORY / "bin" / "build-data"), "--corpus", str(corpus), "--out", str(store)]
    command += ["--recipe", "tiny", "--set", *SMALL]
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=ENVIRONMENT)
    return store


def numbers_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides."""
    lines = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in _RATES} for line in lines]


def last_checkpoint(run: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Every tensor's bytes, and the state without the date."""
    checkpoint = load_checkpoint(CheckpointFolder(run / "checkpoints", keep=1).paths()[-1])
    tensors = {name: checkpoint.tensors[name].numpy().tobytes() for name in checkpoint.tensors}
    return tensors, {name: value for name, value in checkpoint.state.items() if name != "saved"}


def assert_same(run: Path, straight: Path) -> None:
    """The two finished runs have the same numbers at every step, and the same weights and moments, bit for bit."""
    ours, theirs = numbers_of(run), numbers_of(straight)
    assert [(x["kind"], x["step"]) for x in ours] == [(x["kind"], x["step"]) for x in theirs]
    assert ours == theirs
    assert last_checkpoint(run) == last_checkpoint(straight)
    assert RunDirectory(run).status() == RunDirectory(straight).status() == "done"
    left = {path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("damaged-")}
    assert left == {path.name for path in (straight / "checkpoints").iterdir()}


def assert_whole(run: Path) -> None:
    """What must hold at every instant, so after every kill."""
    folder = CheckpointFolder(run / "checkpoints", keep=KEEP)
    paths = folder.paths()
    for path in paths:
        verify_checkpoint(path)
    latest = folder.folder / "latest"
    if latest.is_symlink():
        assert folder.folder / os.readlink(latest) in paths[-2:]
    else:
        assert len(paths) < 2


class Storm:
    """Kills and what came of them."""

    def __init__(self, folder: Path, ranks: int, seed: int, progress: bool = False) -> None:
        self._folder, self._ranks, self._progress = folder, ranks, progress
        self._random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.ways: Counter[str] = Counter()
        self.runs: Counter[str] = Counter({"begun": 0, "finished": 0, "lost": 0})
        self.found: Counter[str] = Counter()
        self.redone: list[int] = []
        self._survivors: list[tuple[Started, int]] = []

    def prepare(self) -> None:
        """The run that nothing disturbs, by the script in an interpreter of its own, and its equal by a fork."""
        self._say("the straight run, by bin/pretrain and by a fork")
        self._store = make_store(self._folder)
        self.straight, log = self._folder / "straight", self._folder / "straight.log"
        arguments = arguments_for(self._store, self.straight, self._ranks)
        command = [sys.executable, str(REPOSITORY / "bin" / "pretrain"), *arguments]
        with log.open("w") as output:
            processes = [
                subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=REPOSITORY)
                for environment in rank_environments(self._ranks)
            ]
            assert [process.wait(300) for process in processes] == [0] * self._ranks, log.read_text()
        forked, counts = self._folder / "forked", self._folder / "counts"
        started = start_run(self._store, forked, self._folder / "forked.log", self._ranks, counts=counts)
        assert started.wait(300) == [0] * self._ranks, started.output
        # Without what the first fork waits for, the imports.
        self._run_s = (forked / "status.json").stat().st_mtime - (forked / ".lock").stat().st_mtime
        assert_same(forked, self.straight)
        self._events = {name: int(count) for name, count in (x.split() for x in counts.read_text().splitlines())}

    def run(self, kills: int) -> None:
        """Runs, each until it is finished, until that many kills have been made.

        Interrupted, it leaves out the run under way.
        """
        while sum(self.kills.values()) < kills:
            index = self.runs["begun"]
            self.runs["begun"] += 1
            run = self._folder / f"run-{index}"
            try:
                self._finish(run, kills)
                assert_same(run, self.straight)
            except KeyboardInterrupt:
                self.runs["begun"] -= 1
                self._started.kill()
                break
            except AssertionError:
                self.runs["lost"] += 1
                self._say(f"LOST: {run}:\n{traceback.format_exc()}")
            else:
                self.runs["finished"] += 1
        self._await_survivors()

    def _finish(self, run: Path, kills: int) -> None:
        """One run to its end."""
        log = run.with_suffix(".log")
        while RunDirectory(run).status() != "done":
            moment = self._moment(run) if sum(self.kills.values()) < kills else None
            reached, leftovers = self._reached(run), len(self._leftovers(run))
            folder = CheckpointFolder(run / "checkpoints", keep=KEEP)
            before = folder.paths()
            self._started = started = start_run(self._store, run, log, self._ranks, moment=moment)
            is_alone = moment is not None and len(moment.victims) < self._ranks
            self._wait(started, moment)
            if "is in use by process" in started.output:  # by the rank that outlived its peer
                self.found["starts refused while a rank of the killed one lived"] += 1
                started.wait()
                time.sleep(0.2)
                continue
            resumed = "Resuming from" in started.output
            if resumed:
                self.found["resumes"] += 1
                self.found["resumes that fell back from a damaged checkpoint"] += "Falling back" in started.output
                self.found["leftovers found and removed"] += leftovers
                if reached:
                    self.redone.append(reached - int(before[-1].name.removeprefix("step-")))
            if -9 in started.statuses:
                assert moment is not None
                self.kills[moment.phase] += 1
                self.ways["all ranks" if not is_alone else f"rank {moment.victims[0]} alone"] += 1
                self.found["kills with a delay"] += moment.delay_s > 0
                if not self._survivors:
                    assert_whole(run)
                total = sum(self.kills.values())
                if total % 10 == 0:
                    self._say(
                        f"{total}/{kills} kills, {self.runs['begun']} runs begun, {self.runs['finished']} finished, "
                        f"{self.runs['lost']} lost; {dict(self.kills)}"
                    )
            else:
                assert started.statuses == [0] * self._ranks, (started.statuses, started.output[-3000:])
                self.found["starts that came through"] += 1

    def _wait(self, started: Started, moment: Moment | None) -> None:
        """Until it ends; a rank that is left alone may be left behind, for `_await_survivors`."""
        deadline = time.monotonic() + 300
        while None in (statuses := started.statuses):
            assert time.monotonic() < deadline, started.output
            if -9 in statuses:
                alone = statuses.index(None)
                self._survivors.append((started, alone))
                if self._random.random() < 0.5:
                    self.found["resumes that did not wait for the rank left alone"] += 1
                    return
                self._await_survivors()
                return
            time.sleep(0.005)

    def _await_survivors(self) -> None:
        for started, rank in self._survivors:
            started.wait(ALONE_S)
            status = started.statuses[rank]
            if status is None:
                started.kill()
            assert status is not None, f"rank {rank} lives on after its peer was killed: {started.output}"
        self._survivors.clear()

    def _moment(self, run: Path) -> Moment:
        """A random moment in the phase that has had the fewest kills, of those that this start will come to."""
        dice = self._random
        saved = CheckpointFolder(run / "checkpoints", keep=KEEP).paths()
        is_there = RunDirectory(run).exists()
        left = STEPS - (int(saved[-1].name.removeprefix("step-")) if saved else 0)
        never = {
            "reading": not is_there, "tidy": not self._leftovers(run), "prune": left < 4 * SAVE_EVERY,
            **dict.fromkeys(("save", "publish", "link"), left < SAVE_EVERY),
        }  # fmt: skip
        fitting = [phase for phase in PHASES if not never.get(phase)]
        phase = min(fitting, key=lambda name: (self.kills[name], dice.random()))
        saves = max(1, left // SAVE_EVERY)
        of_a_save = self._events.get(phase, 1) / (STEPS // SAVE_EVERY)
        nth = {
            "save": dice.randint(1, max(1, int(of_a_save * min(saves, 4)))),
            "publish": dice.randint(1, max(1, int(of_a_save * min(saves, 4)))),
            "link": dice.randint(1, max(1, int(of_a_save * min(saves, 4)))),
            "prune": dice.randint(1, max(1, int(of_a_save * min(saves - KEEP, 3)))),
            "reading": dice.randint(1, 3 + 12 * bool(saved)), "tidy": dice.randint(1, 4),
        }.get(phase) or dice.randint(1, max(1, self._events.get(phase, 1)))  # fmt: skip
        delay_s = dice.choice([0.0, dice.uniform(0, 0.010)])
        victims: tuple[int, ...] = (0,)
        trigger = 0
        if self._ranks > 1:
            victims = dice.choice([(0,), (1,), (0, 1)])
            if phase == "save" and victims == (1,) and dice.random() < 0.7:
                trigger, nth = 1, dice.randint(1, 3 * min(saves, 4))  # its folder and its two files
        if phase == "entry":  # before the ranks have met, those that are left wait for a launcher to end them
            victims = tuple(range(self._ranks))
            delay_s = dice.uniform(0, self._run_s)
        elif phase == "step":
            nth, delay_s = 1, dice.uniform(0, 0.7 * self._run_s)
        elif len(victims) < self._ranks:
            delay_s = dice.choice([delay_s, dice.uniform(0, 0.5)]) if phase == "lock" else delay_s
        return Moment(phase, nth, delay_s, victims, trigger)

    def _reached(self, run: Path) -> int:
        metrics = run / "metrics.jsonl"
        return max((line["step"] for line in read_metrics(metrics)), default=0) if metrics.exists() else 0

    def _leftovers(self, run: Path) -> list[Path]:
        return CheckpointFolder(run / "checkpoints", keep=KEEP).leftovers()

    def _say(self, text: str) -> None:
        if self._progress:
            print(text, flush=True)

    def results(self) -> dict[str, Any]:
        """What is published."""
        return {
            "ranks": self._ranks,
            "kills": sum(self.kills.values()),
            "kills_by_phase": {phase: self.kills[phase] for phase in PHASES},
            "kills_by_rank": dict(sorted(self.ways.items())),
            "runs": dict(self.runs),
            "steps_of_a_run": STEPS,
            "save_every": SAVE_EVERY,
            "keep": KEEP,
            "steps_redone": {
                "resumes": len(self.redone), "total": sum(self.redone), "most": max(self.redone, default=0),
            },
            "found": dict(sorted(self.found.items())),
        }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.storm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="how many to make (default: 200)")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1, help="of a run, all on this machine")
    parser.add_argument("--seed", type=int, default=0, help="chooses the moments; timing chooses along (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the counts there as JSON")
    parser.add_argument("--folder", type=Path, help="where the runs live, and stay (default: a temporary folder)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        storm = Storm(folder, options.ranks, options.seed, progress=True)
        storm.prepare()
        storm.run(options.kills)
    about: Mapping[str, Any] = {
        "command": f"python -m tests.storm --kills {options.kills} --ranks {options.ranks} --seed {options.seed}",
        "versions": versions(),
    }
    results = dict(about) | storm.results() | {"seconds": round(time.monotonic() - began)}
    print(json.dumps(results, indent=2))
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", "utf8")
    sys.exit(1 if storm.runs["lost"] else 0)


if __name__ == "__main__":
    main()
