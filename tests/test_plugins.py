"""Parts of other packages by name: the example package as users install it, and packages that are broken."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import electra_ds
from electra_ds import Callback, Metric, Run
from electra_ds.cli import main
from electra_ds.config.plugins import CALLBACK, OBJECTIVE, find
from electra_ds.core.errors import ConfigError, PluginError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from electra_ds.finetuning.metrics import further_metrics
from electra_ds.training.callbacks import Progress
from tests.finetune_runs import tiny_electra
from tests.helpers import REPOSITORY, SMALL

STEPS = ("schedule.total_steps=12", "schedule.warmup_steps=2")
CLOZE = [each for each in SMALL if not each.startswith(("generator.", "discriminator.", "masking."))]


class Steps(Callback):
    """Keeps the steps of all runs of this process."""

    seen: list[int] = []  # noqa: RUF012  # of the class, since a run creates the object

    def on_step(self, progress: Progress, step: int, metrics: object) -> None:
        self.seen.append(step)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path for packages with entry points."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    find.cache_clear()


def register(folder: Path, package: str, group: str, name: str, place: str) -> None:
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[electra_ds.{group}]\n{name} = {place}\n")
    importlib.invalidate_caches()
    find.cache_clear()


@pytest.mark.slow
def test_the_example_package_is_installed_listed_and_used(
    store: TokenStore, tmp_path: Path, process_group: Ranks, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(
        REPOSITORY / "examples" / "plugin", tmp_path / "plugin"
    )  # pip builds in the source's folder
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target",
            packages, source,
        ],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    importlib.invalidate_caches()
    main(["plugins"])
    shown = capsys.readouterr().out
    assert "electra_ds_cloze.objective:Cloze" in shown
    assert "electra_ds_cloze.best:BestEvaluation" in shown
    run = tmp_path / "run"
    main(
        [
            "pretrain", "--recipe", "tiny", "--ds-config", "cpu", "--data", str(store.path), "--run-dir", str(run),
            "--callback", "best-evaluation", "--eval-every", "3", "--eval-windows", "16", "--threads", "1",
            "--set", "objective=cloze", *CLOZE, *STEPS,
        ]
    )  # fmt: skip
    evaluations = Run(run).metrics.query("kind == 'eval'")
    best = json.loads((run / "best.json").read_text())
    assert best["cloze_loss"] == evaluations["cloze_loss"].min()
    for name in ("train", "dev"):
        (tmp_path / f"{name}.txt").write_text("__label__good a bright day\n__label__bad a dull day\n" * 8)
    for task, tuned in (("labelled-lines", "named"), ("electra_ds_cloze.lines:LabelledLines", "placed")):
        arguments = [
            "--task",
            task,
            "--train",
            f"{tmp_path}/train.txt",
            "--dev",
            f"{tmp_path}/dev.txt",
            "--threads",
            "1",
        ]
        main(
            [
                "finetune", "--model", str(run), "--ds-config", "cpu", "--run-dir", str(tmp_path / tuned), *arguments,
                "--callback", "best-evaluation", "--stop-at", "2", "--set", "schedule.min_steps=4", "schedule.epochs=1",
                "metrics=[worst-recall]",
            ]
        )  # fmt: skip
        main(["finetune", "--resume", str(tmp_path / tuned)])
        scores = json.loads((tmp_path / tuned / "scores.json").read_text())
        assert scores["sets"]["dev"]["rows"] == 16
        assert {"worst-recall"} < scores["sets"]["dev"]["metrics"].keys() == scores["sets"]["dev"]["baseline"].keys()
        assert scores["task"] == "train"
    main(["export", str(tmp_path / "named"), "--encoder-only"])
    for name in ("train", "dev"):
        rows = "".join(
            f"a {word} day,{stars}\n" for stars, word in enumerate(("bad", "dull", "fair", "good")) for _ in "abcd"
        )
        (tmp_path / f"{name}.csv").write_text("review,stars\n" + rows)
    main(
        [
            "finetune", "--model", str(run), "--ds-config", "cpu", "--run-dir", str(tmp_path / "ranked"),
            "--threads", "1", "--task", "ranking", "--train", f"{tmp_path}/train.csv", "--dev", f"{tmp_path}/dev.csv",
            "--set", "schedule.min_steps=60", "optimizer.learning_rate=3e-3",
        ]
    )  # fmt: skip
    of_dev = json.loads((tmp_path / "ranked" / "scores.json").read_text())["sets"]["dev"]
    assert of_dev["metrics"]["within_one"] >= of_dev["baseline"]["within_one"]
    films = tmp_path / "films"
    films.mkdir()
    (films / "one.srt").write_text(
        "1\n00:00:01,000 --> 00:00:02,500\n<i>Good day</i>\n\n2\n00:00:03,0 --> 00:00:04,0\nto you\n" * 20
    )
    for corpus in (f"subtitles:{films}", f"electra_ds_cloze.subtitles:Subtitles:{films}"):
        out = tmp_path / f"store-{len(corpus)}"
        made = electra_ds.build_data([corpus], out, tokenizer=store.path / "tokenizer", quiet=True)
        text = made.tokenizer.backend.decode(made.tokens[:40].tolist())
        assert "good" in text.lower()
        assert "00" not in text


def test_a_resumed_run_has_the_callbacks_that_it_was_started_with(
    store: TokenStore, tmp_path: Path, process_group: Ranks
) -> None:
    Steps.seen.clear()
    run = electra_ds.pretrain(
        "tiny", data=store.path, ds_config="cpu", run_dir=tmp_path / "run", overrides=[*SMALL, *STEPS], stop_at=5,
        callback=["tests.test_plugins:Steps"], threads=1, eval_windows=16, quiet=True,
    )  # fmt: skip
    assert Steps.seen == [1, 2, 3, 4, 5]
    run.resume(quiet=True)
    assert Steps.seen == [*range(1, 13)]


def test_a_broken_package_is_reported_and_affects_nothing_else(
    packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (packages / "broken.py").write_text("def MyObjective():\n    pass\n\n\nraise RuntimeError('no licence')\n")
    register(packages, "broken", "objectives", "mine", "broken:MyObjective")
    late = "class Late(Callback):\n    def on_evaluate(self, metrics):\n        pass\n"
    (packages / "late.py").write_text(f"from electra_ds import Callback\n\n\n{late}")
    (packages / "half.py").write_text("from electra_ds import Objective\n\n\nclass Half(Objective):\n    pass\n")
    register(packages, "late", "callbacks", "late", "late:Late")
    register(packages, "half", "objectives", "half", "half:Half")
    register(packages, "absent", "callbacks", "yours", "not_there:Tracker")
    register(packages, "other", "objectives", "electra", "other_package:Electra")
    with pytest.raises(SystemExit) as stopped:
        main(["plugins"])
    assert stopped.value.code == 1
    shown = "".join(capsys.readouterr().out.split())  # without the ends of lines
    for told in (
        f"RuntimeError: no licence ({packages / 'broken.py'}, line 5).",
        f"The callback 'late' cannot be loaded from late:Late: Late.on_evaluate must take (self, progress, metrics): "
        f"too many positional arguments ({packages / 'late.py'}, line 4).",
        "The objective 'half' lacks build_model, encoder, exports, key_metrics, loss_names, main_metric, make_batch",
        "The callback 'yours' cannot be loaded from not_there:Tracker: No module named 'not_there'",
        "Two packages register an objective 'electra': electra_ds.pretraining.objectives.electra",
    ):
        assert "".join(told.split()) in shown
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "--help"])
    assert stopped.value.code == 0
    assert find(OBJECTIVE, "mlm").__name__ == "MlmObjective"


class accuracy(Metric):  # noqa: N801  # a name that is taken
    def score(self, labels: np.ndarray, predictions: np.ndarray) -> float:
        return 0.0


def test_a_metric_with_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_electra(tmp_path / "encoder")
    for named, message in (
        (["tests.test_plugins:accuracy"], "the name 'accuracy' is used twice"),
        (["electra_ds_cloze.worst:WorstRecall"] * 2, "the name 'WorstRecall' is used twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            electra_ds.finetune(
                model, train=path, dev=path, ds_config="cpu", run_dir=tmp_path / "run", quiet=True,
                overrides={"metrics": named, "data.max_length": 16},
            )  # fmt: skip
    with pytest.raises(
        PluginError, match=r"'electra_ds_cloze\.worst:WorstRecall' cannot be computed for labels of shape"
    ):
        further_metrics(["electra_ds_cloze.worst:WorstRecall"], (), np.ones((2, 2), bool), np.ones((2, 2), bool))


def test_what_is_no_such_class_is_refused_before_anything_is_written(
    store: TokenStore, tmp_path: Path, process_group: Ranks
) -> None:
    with pytest.raises(PluginError, match=r"There is no callback 'best'.* or write package\.module:Class\."):
        find(CALLBACK, "best")
    with pytest.raises(PluginError, match=r"is not a subclass of electra_ds\.Callback \(docs/python\.md\)"):
        electra_ds.pretrain("tiny", data=store.path, run_dir=tmp_path / "run", callback=["pathlib:Path"], quiet=True)
    assert not (tmp_path / "run").exists()
