"""The notebook runs from beginning to end in a kernel of its own, and continues a run that was cut off."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import electra_ds
from electra_ds import Run
from electra_ds.core.ranks import Ranks
from tests.helpers import REPOSITORY

STEPS = 20


@pytest.mark.slow
def test_the_notebook_continues_a_run_that_was_cut_off_and_shows_what_it_learned(
    corpus_folder: Path, tmp_path: Path, process_group: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    electra_ds.pretrain(
        "tiny", corpus=corpus_folder, run_dir=tmp_path / "first" / "run", stop_at=7, quiet=True,
        overrides={"schedule.total_steps": STEPS, "tokenizer.vocab_size": 400}, eval_windows=16,
    )  # fmt: skip
    notebook = nbformat.read(REPOSITORY / "examples" / "first_run.ipynb", as_version=4)
    install, settings = [cell for cell in notebook.cells if cell.cell_type == "code"][:2]
    assert install.source.startswith("%pip")
    install.source = ""  # the package is here
    settings.source = f'FOLDER, CORPUS, RECIPE, STEPS = "first", "{corpus_folder}", "tiny", {STEPS}'
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.data for output in shown if "data" in output]
    assert any(each.get("text/plain") == "'done'" for each in data)
    of_run = "".join(output.get("text", "") for output in notebook.cells[5].outputs)
    assert "ipywidgets" not in of_run
    assert f"step {STEPS}/{STEPS}  generator loss" in of_run  # a plain line, since a bar needs ipywidgets
    assert any("image/png" in each for each in data)
    assert any("discriminator_auc" in each.get("text/plain", "") for each in data)
    assert any("✓ detected" in output.get("text", "") for output in shown)
    assert "discriminator AUC" in (tmp_path / "first" / "run" / "summary.txt").read_text("utf8")
    steps = Run(tmp_path / "first" / "run").metrics.query("kind == 'train'")["step"]
    assert steps.tolist() == [*range(1, STEPS + 1)]
