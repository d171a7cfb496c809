"""No fault loses a run: kills at random moments, damaged files, full and read-only disks, signals, a second process.

After each the run is resumed as a user would, and must end bit for bit as one that nothing disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from electra_ds.config.run_directory import RunDirectory, read_metrics
from electra_ds.config.run_record import RunRecord, RunSettings
from electra_ds.core.errors import CheckpointError
from electra_ds.data.token_store import TokenStore
from electra_ds.training.checkpoint import CheckpointFolder, verify_checkpoint
from electra_ds.training.checkpoints import prune
from tests.forks import Moment, Started
from tests.helpers import REPOSITORY
from tests.storm import STEPS, arguments_for, assert_same, start_run
from tests.training.test_checkpoint import RECORD, tensors

# --- kills


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "kills"),
    [(1, 8), *(pytest.param(ranks, kills, marks=pytest.mark.nightly) for ranks, kills in ((2, 2), (1, 100), (2, 100)))],
)
@pytest.mark.timeout(3600)
def test_a_storm_of_kills_loses_no_run(tmp_path: Path, ranks: int, kills: int) -> None:
    out = tmp_path / "faults.json"
    command = [sys.executable, "-m", "tests.storm", "--kills", str(kills), "--ranks", str(ranks), "--out", str(out)]
    result = subprocess.run(
        [*command, "--seed", str(kills)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(out.read_text())
    assert found["kills"] == kills
    assert found["runs"]["lost"] == 0
    assert found["runs"]["finished"] == found["runs"]["begun"]
    assert found["steps_redone"]["most"] <= 2 * found["save_every"]
    assert found["found"].get("resumes that fell back from a damaged checkpoint", 0) == 0


def test_a_kill_before_any_file_operation_of_a_save_leaves_the_newest_checkpoint_or_the_one_before(
    tmp_path: Path,
) -> None:
    """With a single checkpoint to keep, so that the old one is removed as soon as the new one stands."""
    contents = {step: tensors(step) for step in (1, 2)}
    operations, status = 0, None
    while status != 0:
        operations += 1
        folder = CheckpointFolder(tmp_path / str(operations), keep=1)
        folder.save(contents[1], {"step": 1}, RECORD)
        child = os.fork()
        if child == 0:
            _kill_at(operations)
            folder.save(contents[2], {"step": 2}, RECORD)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        latest = folder.folder / os.readlink(folder.folder / "latest")
        verify_checkpoint(latest)
        newest, damaged = folder.latest_valid()
        assert not damaged
        assert newest is not None
        folder.tidy([])
        # No older one is left, even by a kill between the new one's name and the removal of the old.
        assert {path.name for path in folder.folder.iterdir()} == {"latest", newest.name}
        assert os.readlink(folder.folder / "latest") == newest.name
        if newest != folder.path(2):
            folder.save(contents[2], {"step": 2}, RECORD)
        assert folder.latest_valid() == (folder.path(2), {})
    assert operations > 20


def test_a_kill_before_any_file_operation_of_a_prune_leaves_what_was_to_stay(tmp_path: Path) -> None:
    """Of a run with four checkpoints, two of which it keeps, and a leftover."""
    settings = RunSettings(log_every=1, eval_every=1, save_every=1, keep=2, eval_windows=1)
    blank = RunRecord(
        store="", store_fingerprint="", parameters={}, device="", threads=1, world_size=1, settings=settings, command=[]
    )
    operations, status = 0, None
    while status != 0:
        operations += 1
        run = RunDirectory(tmp_path / str(operations))
        run.path.mkdir()
        (run.path / "run.json").write_text(blank.to_json())
        folder = CheckpointFolder(run.checkpoints, keep=9)
        for step in (1, 2, 3, 4):
            folder.save(tensors(step), {"step": step}, RECORD)
        (folder.folder / ".writing-step-00000005-ab").mkdir()
        child = os.fork()
        if child == 0:
            _kill_at(operations)
            list(prune(run.path, None, damaged=False, dry=False))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.readlink(folder.folder / "latest") == "step-00000004"
        for path in folder.paths():
            verify_checkpoint(path)
        assert folder.paths()[-2:] == [folder.path(3), folder.path(4)]
        list(prune(run.path, None, damaged=False, dry=False))
        assert sorted(path.name for path in folder.folder.iterdir()) == ["latest", "step-00000003", "step-00000004"]
    assert operations > 10


def _kill_at(count: int) -> None:
    left = count

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


# --- whole runs


@pytest.fixture(scope="module")
def straight(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run that nothing disturbs, by the number of ranks."""
    made: dict[int, Path] = {}

    def make(ranks: int) -> Path:
        if ranks not in made:
            folder = tmp_path_factory.mktemp(f"straight{ranks}")
            started = start_run(store.path, folder / "run", folder / "log", ranks)
            assert started.wait() == [0] * ranks, started.output
            made[ranks] = folder / "run"
        return made[ranks]

    return make


@pytest.fixture(scope="module")
def parted(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Path], Path]:
    """Copies of a run that stopped two checkpoints before its end."""
    made: dict[int, Path] = {}

    def copy(ranks: int, to: Path) -> Path:
        if ranks not in made:
            folder = tmp_path_factory.mktemp(f"parted{ranks}")
            started = start_run(store.path, folder / "run", folder / "log", ranks, "--stop-at", str(STEPS - 3))
            assert started.wait() == [0] * ranks, started.output
            # The evaluation at its end is not one of a run that goes on.
            metrics = folder / "run" / "metrics.jsonl"
            lines = metrics.read_text().splitlines(keepends=True)
            metrics.write_text("".join(lines[:-1]))
            made[ranks] = folder / "run"
        shutil.copytree(made[ranks], to, symlinks=True, dirs_exist_ok=True)
        return to

    return copy


class Start:
    """Starts of one run, each ended at the latest with the test."""

    def __init__(self, store: TokenStore, run: Path, log: Path) -> None:
        self._store, self._log = store, log
        self.run = run
        self._started: list[Started] = []

    def __call__(self, *more: str, ranks: int = 1, **how: object) -> Started:
        started = start_run(self._store.path, self.run, self._log, ranks, *more, **how)
        self._started.append(started)
        return started

    def through(self, ranks: int = 1) -> str:
        """Start or resume, and wait for the end of the run; what it printed."""
        started = self(ranks=ranks)
        assert started.wait() == [0] * ranks, started.output
        return started.output

    def kill(self) -> None:
        for started in self._started:
            started.kill()


@pytest.fixture
def begin(store: TokenStore, tmp_path: Path) -> Iterator[Start]:
    start = Start(store, tmp_path / "run", tmp_path / "log")
    yield start
    start.kill()


def wait_for(condition: Callable[[], object], started: Started, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, started.output
        assert None in started.statuses, started.output
        time.sleep(0.005)


def reached(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(metrics)), default=0) if metrics.exists() else 0


# What makes a process's surroundings worse; called in the process before the command.


def slow_disk(seconds: float) -> None:
    from electra_ds.training import checkpoint

    write = checkpoint.write_tensors

    def slowly(path: Path, group: object) -> object:
        time.sleep(seconds)
        return write(path, group)  # type: ignore[arg-type]

    checkpoint.write_tensors = slowly  # type: ignore[assignment]


def pretrained_before(arguments: Sequence[str]) -> None:
    from electra_ds.cli import main

    main(["pretrain", *arguments])


def broken_writer() -> None:
    from electra_ds.training import checkpoint

    def write(path: Path, group: object) -> object:
        raise MemoryError("none left")

    checkpoint.write_tensors = write  # type: ignore[assignment]


def small_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGE = {"flipped": flipped, "cut": cut, "removed": Path.unlink}
OF_ONE_RANK = ["optimizer.safetensors", "weights.safetensors"]
OF_TWO_RANKS = [f"{name}-0000{rank}-of-00002.safetensors" for name in ("optimizer", "weights") for rank in (1, 2)]
TEXTS = ["deepspeed.json", "manifest.json", "recipe.yaml", "run.json", "state.json", "tokenizer.json"]
IN_CI = [(1, "flipped", name) for name in (*OF_ONE_RANK, *TEXTS)]
IN_CI += [(1, "cut", "manifest.json"), (1, "removed", "weights.safetensors")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "damage", "name"),
    [
        pytest.param(ranks, damage, name, marks=[] if (ranks, damage, name) in IN_CI else [pytest.mark.nightly])
        for ranks, tensor_files in ((1, OF_ONE_RANK), (2, OF_TWO_RANKS))
        for damage in DAMAGE
        for name in (*tensor_files, *TEXTS)
    ],
)
def test_a_damaged_file_of_the_newest_checkpoint_costs_its_steps_and_no_more(
    straight: Callable[[int], Path], parted: Callable[[int, Path], Path], begin: Start, ranks: int, damage: str,
    name: str,
) -> None:  # fmt: skip
    run = parted(ranks, begin.run)
    newest, before = run / "checkpoints" / f"step-{STEPS - 3:08d}", f"step-{STEPS - 6:08d}"
    assert sorted(path.name for path in newest.iterdir()) == sorted((*TEXTS, *(OF_ONE_RANK, OF_TWO_RANKS)[ranks - 1]))
    DAMAGE[damage](newest / name)
    output = begin.through(ranks)
    assert f"Warning: The checkpoint {newest} is damaged" in output
    assert name in output
    assert output.count("Falling back to the checkpoint before it.") == 1
    assert f"{before}, step {STEPS - 6}." in output
    assert (run / "checkpoints" / f"damaged-{newest.name}").is_dir()
    assert os.readlink(run / "checkpoints" / "latest") == f"step-{STEPS:08d}"
    assert_same(run, straight(ranks))


@pytest.mark.slow
def test_a_file_too_large_for_rank_1_is_told_by_rank_1_alone_and_the_run_goes_on(
    straight: Callable[[int], Path], parted: Callable[[int, Path], Path], begin: Start
) -> None:
    """Rank 0 is still at its own share when rank 1 fails, which must not break it there."""
    run = parted(2, begin.run)
    (run / "checkpoints" / f"step-{STEPS - 3:08d}" / "manifest.json").unlink()  # so that two saves are left
    started = begin(ranks=2, prepare={0: (slow_disk, 1.0), 1: (small_files, 20_000)})
    assert started.wait() == [2, 2], started.output
    assert started.output.count("electra-ds pretrain") == 1, started.output
    assert "electra-ds pretrain (rank 1): Cannot write the checkpoint" in started.output
    assert "File too large" in started.output
    assert f"The newest complete one is {run / 'checkpoints' / f'step-{STEPS - 6:08d}'}" in started.output
    assert "Traceback" not in started.output
    assert RunDirectory(run).status() == "failed"
    assert not CheckpointFolder(run / "checkpoints", keep=1).leftovers()
    begin.through(2)
    assert_same(run, straight(2))


@pytest.mark.slow
def test_an_error_of_one_writer_that_nobody_foresaw_ends_all_ranks(
    straight: Callable[[int], Path], begin: Start
) -> None:
    started = begin(ranks=2, prepare={1: (broken_writer,)})
    assert started.wait(60) == [2, 1], started.output
    assert "MemoryError: none left" in started.output
    assert reached(begin.run) <= 6
    begin.through(2)
    assert_same(begin.run, straight(2))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """A file system of its own at a folder; called again, with other options."""
    mounted: list[Path] = []

    def mount(folder: Path, options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        again = ["-o", f"remount,{options}"] if folder in mounted else ["-t", "tmpfs", "-o", options]
        result = subprocess.run(
            ["mount", *again, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )  # fmt: skip
        if result.returncode:
            pytest.skip(f"no file system can be mounted here: {result.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in set(mounted):
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


@pytest.mark.slow
def test_a_full_disk_is_one_clear_message_as_long_as_it_is_full_and_costs_nothing(
    straight: Callable[[int], Path], begin: Start, disk: Callable[..., None]
) -> None:
    checkpoint = straight(1) / "checkpoints" / "latest"
    size = sum(file.stat().st_size for file in checkpoint.resolve().iterdir())
    disk(begin.run, f"size={int(2.6 * size)}")  # two checkpoints are kept, so the third has no room
    started = begin()
    assert started.wait() == [2], started.output
    assert started.output.count("electra-ds pretrain: Cannot write the checkpoint") == 1, started.output
    assert "No space left on device" in started.output
    assert "Free disk space, then resume with --resume" in started.output
    assert "Traceback" not in started.output
    assert reached(begin.run) <= 12
    assert not CheckpointFolder(begin.run / "checkpoints", keep=1).leftovers()
    (begin.run / ".lock").unlink()  # so that it needs room too
    with (begin.run / "other").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    before = (begin.run / "metrics.jsonl").read_text()
    started = begin()
    assert started.wait() == [2], started.output
    assert f"electra-ds pretrain: Cannot write {begin.run}" in started.output
    assert "Traceback" not in started.output
    assert (begin.run / "metrics.jsonl").read_text() == before
    (begin.run / "other").unlink()
    disk(begin.run, f"size={10 * size}")
    begin.through()
    assert_same(begin.run, straight(1))


@pytest.mark.slow
@pytest.mark.parametrize("folder", [".", "checkpoints"])
def test_a_read_only_folder_is_found_at_the_start(
    straight: Callable[[int], Path], parted: Callable[[int, Path], Path], begin: Start, disk: Callable[..., None],
    folder: str,
) -> None:  # fmt: skip
    mounted = begin.run / folder
    disk(mounted, "size=20m")
    run = parted(1, begin.run)
    metrics = (run / "metrics.jsonl").read_text()
    disk(mounted, "ro")
    started = begin()
    assert started.wait() == [2], started.output
    wanted = "Cannot write into the run directory" if folder == "." else "it is not writable"
    assert wanted in started.output
    assert "Traceback" not in started.output
    assert (run / "metrics.jsonl").read_text() == metrics
    if folder == ".":  # as where a disk becomes read-only under a run
        for act in (lambda: RunDirectory(run).write_status("failed"), RunDirectory(run).clear_status):
            with pytest.raises(CheckpointError, match="Read-only file system"):
                act()
    disk(mounted, "rw")
    begin.through()
    assert_same(run, straight(1))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_directory_of_somebody_else_is_found_at_the_start(
    parted: Callable[[int, Path], Path], begin: Start
) -> None:
    run = parted(1, begin.run)
    for folder, wanted in ((run, "Cannot write into the run directory"), (run / "checkpoints", "is not writable")):
        (run / ".lock").unlink(missing_ok=True)
        folder.chmod(0o555)
        started = begin()
        assert started.wait() == [2], started.output
        assert wanted in started.output
        folder.chmod(0o755)
    begin.through()


@pytest.mark.slow
def test_a_second_process_is_refused_and_does_not_disturb_the_first(
    straight: Callable[[int], Path], begin: Start
) -> None:
    first = begin(prepare={0: (slow_disk, 0.1)})
    wait_for(lambda: reached(begin.run) >= 5, first)
    second = begin()
    assert second.wait() == [2], second.output
    assert f"is in use by process {first.processes[0].pid}" in second.output
    assert first.statuses == [None]
    assert first.wait() == [0], first.output
    assert_same(begin.run, straight(1))


@pytest.mark.nightly
def test_a_run_goes_on_while_a_rank_of_the_killed_one_still_writes(
    straight: Callable[[int], Path], begin: Start
) -> None:
    """Rank 0 is killed in its save; rank 1 comes to its own share of it a second later, in a folder that is gone."""
    killed = begin(
        ranks=2, prepare={1: (slow_disk, 2.0)}, moment=Moment("save", nth=30, delay_s=0.02, victims=(0,))
    )  # fmt: skip
    wait_for(lambda: -9 in killed.statuses, killed)
    assert killed.statuses == [-9, None]
    begin.through(2)
    assert killed.wait(30) == [-9, 2], killed.output
    assert_same(begin.run, straight(2))


@pytest.mark.slow
def test_signals_in_the_middle_of_a_slow_save_wait_for_it_and_for_the_next(
    straight: Callable[[int], Path], begin: Start
) -> None:
    """One comes while the save before is being written, the next while that of the stop is."""
    started = begin(prepare={0: (slow_disk, 0.6)})
    checkpoints = begin.run / "checkpoints"
    wait_for(lambda: reached(begin.run) > 6, started)  # not at 6, whose checkpoint the stop's would be too
    started.signal(signal.SIGTERM)
    wait_for(lambda: [path for path in checkpoints.glob(".writing-step-*") if "00000006" not in path.name], started)
    started.signal(signal.SIGTERM)
    assert started.wait() == [128 + signal.SIGTERM], started.output
    folder = CheckpointFolder(checkpoints, keep=2)
    before, last = folder.paths()
    assert before.name < last.name
    assert f"SIGTERM: saved {last}." in started.output
    assert folder.latest_valid() == (last, {})
    assert not folder.leftovers()
    assert RunDirectory(begin.run).status() == "stopped"
    begin.through()
    assert_same(begin.run, straight(1))


@pytest.mark.slow
def test_a_process_that_has_pretrained_before_pretrains_alike(
    store: TokenStore, straight: Callable[[int], Path], begin: Start, tmp_path: Path
) -> None:
    """DeepSpeed by itself would go on with the process group of the first run, which is gone."""
    before = [*arguments_for(store.path, tmp_path / "before", 1), "--stop-at", "3"]
    started = begin(prepare={0: (pretrained_before, before)})
    assert started.wait() == [0], started.output
    assert reached(tmp_path / "before") == 3
    assert_same(begin.run, straight(1))


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_last_evaluation_does_not_tell_it_twice(
    straight: Callable[[int], Path], begin: Start
) -> None:
    started = begin(moment=Moment("status", nth=4))  # three are of the start
    assert started.wait() == [-9], started.output
    assert reached(begin.run) == STEPS
    begin.through()
    assert_same(begin.run, straight(1))


@pytest.mark.slow
def test_a_run_without_a_checkpoint_yet_may_be_resumed_with_more_frequent_ones(
    straight: Callable[[int], Path], begin: Start
) -> None:
    started = begin("--save-every", "1000")
    wait_for(lambda: reached(begin.run) > 15, started)
    started.kill()
    assert not list(begin.run.glob("checkpoints/step-*"))
    resumed = begin("--save-every", "3")
    assert resumed.wait() == [0], resumed.output
    assert_same(begin.run, straight(1))


def test_a_folder_with_checkpoints_is_no_place_for_a_new_run(tmp_path: Path) -> None:
    """Its record was lost; a new run would go on from another's weights."""
    assert not RunDirectory(tmp_path).exists()
    CheckpointFolder(tmp_path / "checkpoints", keep=1).save(tensors(), {"step": 1}, RECORD)
    assert RunDirectory(tmp_path).exists()


def test_tidying_is_not_disturbed_by_a_rank_that_still_writes(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):
                for index in range(20):
                    (tmp_path / ".writing-step-00000009-abcd0123").mkdir(exist_ok=True)
                    (tmp_path / ".writing-step-00000009-abcd0123" / str(index)).touch()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            folder.tidy([])
    finally:
        over.set()
        writer.join()
    folder.tidy([])
    assert not folder.leftovers()
