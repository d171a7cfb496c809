"""Imports go one way: a module imports only from its own room or from rooms in the rows before it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

ROWS = [
    {"core"},
    {"config"},
    {"model", "data", "training"},
    {"pretraining"},
    {"finetuning", "report"},
    {"interop", "sweep"},
    {"api"},
    {"cli"},
    {"__main__"},
]
# Imports inside functions, besides those of the commands and the API: what takes seconds and a run's first step does
# not need.
LATE = {
    ("electra_ds.data.hub", "datasets"),  # slow to import, and not needed for local files
    ("electra_ds.data.hub", "datasets.exceptions"),
    ("electra_ds.finetuning.squad", "datasets"),
    ("electra_ds.finetuning.load_task", "datasets"),
    ("electra_ds.finetuning.own_rows", "datasets"),
    ("electra_ds.finetuning.tables", "pandas"),  # which the check of a sweep does not need
    ("electra_ds.__main__", "electra_ds.cli"),  # which needs packages that may be missing
    # Exports need transformers, whose import takes as long as torch's.
    ("electra_ds.pretraining.objectives.electra", "electra_ds.pretraining.convert"),
    ("electra_ds.pretraining.objectives.joint", "electra_ds.pretraining.convert"),
    ("electra_ds.pretraining.objectives.mlm", "electra_ds.pretraining.convert"),
    ("electra_ds.pretraining.objectives.base", "transformers"),  # for type checkers
    ("electra_ds.finetuning.metrics", "sklearn.metrics"),
    ("electra_ds.finetuning.metrics", "scipy.stats"),
    ("electra_ds.finetuning.tasks.multi_label", "sklearn.metrics"),
    ("electra_ds.finetuning.tasks.sentence_embeddings", "sklearn.metrics"),
    ("electra_ds.finetuning.conll", "pandas"),
    ("electra_ds.finetuning.own_rows", "pandas"),
    ("electra_ds.finetuning.tasks.token_classification", "seqeval.metrics"),
    ("electra_ds.report.scores", "scipy"),
    ("electra_ds.sweep.__init__", "electra_ds.sweep.run"),  # for type checkers
    ("electra_ds.sweep.__init__", "electra_ds.sweep.tune_trial"),
    ("electra_ds.sweep.run", "electra_ds.sweep.tune"),  # Ray, which trials one by one do not need
    ("electra_ds.sweep.options", "electra_ds.finetuning.load_task"),  # which only examples of the user's own need
    ("electra_ds.sweep.tune", "optuna"),  # which need not be installed
    ("electra_ds.sweep.tune", "ray.tune.search.optuna"),
}
# Modules below the command line that print or use a console. All others log, call callbacks or return data.
PRINTING = {
    "core/terminal.py",  # wraps the console for all others, and opens the API's default display
    "api/launch.py",  # shows the progress of a run by a callback
    "core/launcher.py",  # the last words of a signal handler, which must not wait for the log's lock
    "sweep/processes.py",  # the same
    "report/tables.py",  # renders a report for the console that it is given, or as text
}
FILES = sorted((REPOSITORY / "electra_ds").rglob("*.py"))


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at the top of the file)."""
    tree = ast.parse(path.read_text("utf8"))
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        found += [(name, id(node) in top) for name in names]
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "core"


def row_of(module: str) -> int:
    return next(index for index, row in enumerate(ROWS) if room_of(module) in row)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_go_one_way(path: Path) -> None:
    own = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    if own == "electra_ds.__init__":
        return  # it names the API's functions, for type checkers alone
    for module, at_top in imports_of(path):
        if module.startswith("electra_ds"):
            goes_down = row_of(module) < row_of(own)
            assert goes_down or room_of(module) == room_of(own), f"{own} imports {module}"
        may_be_late = own.startswith(("electra_ds.cli.", "electra_ds.api.")) or (own, module) in LATE
        assert at_top or may_be_late, f"{own} imports {module} inside a function"


_WRITING = ("print", "sys.stdout.write", "sys.stderr.write")


def printing_in(path: Path) -> list[str]:
    """The calls that write to the terminal, and the imports of rich's console and bars, except in annotations."""
    tree = ast.parse(path.read_text("utf8"))
    typing = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {id(node) for block in typing for node in ast.walk(block)}
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in _WRITING:
            found.append(ast.unparse(node.func))
        if id(node) not in for_types:
            found += [name for name in names if re.match(r"rich\.(console\.Console|print|progress\b)|rich$", name)]
    return found


def test_nothing_below_the_command_line_prints() -> None:
    package = REPOSITORY / "electra_ds"
    found = {str(path.relative_to(package)): printing_in(path) for path in FILES if path.parent.name != "cli"}
    assert {name for name, printing in found.items() if printing} == PRINTING


def test_config_does_not_know_torch_and_few_know_deepspeed_and_ray() -> None:
    users = {path.name for path in FILES if any(name.split(".")[0] == "deepspeed" for name, _ in imports_of(path))}
    assert users == {"engine.py", "export_deepspeed.py", "initialize.py", "zero.py"}
    users = {path.name for path in FILES if any(name.split(".")[0] == "ray" for name, _ in imports_of(path))}
    assert users == {"tune.py", "tune_trial.py"}
    for path in (REPOSITORY / "electra_ds" / "config").glob("*.py"):
        assert not any(name.split(".")[0] in ("torch", "transformers") for name, _ in imports_of(path))


def test_building_a_token_store_waits_for_neither_torch_nor_transformers() -> None:
    """Each of its worker processes would import them too."""
    large = "{'torch', 'transformers', 'deepspeed', 'pandas', 'datasets'}"
    code = f"import sys, electra_ds.api.stores; sys.exit(' '.join({large} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_training_knows_no_objective_and_no_task() -> None:
    """It sees a model, batches with a size, and losses by name."""
    for path in (REPOSITORY / "electra_ds" / "training").glob("*.py"):
        words = re.findall(r"(?i)generator|discriminator|\bmask|glue", path.read_text("utf8"))
        assert not words, f"{path} says {', '.join(words)}"


def test_there_are_few_rooms_on_few_floors_with_few_arrows_between_them() -> None:
    arrows = {
        (room_of(".".join(path.relative_to(REPOSITORY).with_suffix("").parts)), room_of(module))
        for path in FILES
        for module, _ in imports_of(path)
        if module.startswith("electra_ds.") and path.parent.name != "electra_ds"
    }
    arrows = {(here, there) for here, there in arrows if here != there}
    rooms = {path.relative_to(REPOSITORY).parts[1] for path in FILES if path.parent.name != "electra_ds"}
    assert len(rooms) <= 12
    assert len(ROWS) - 1 <= 8  # the last one is the entry point
    assert len(arrows) <= 50, len(arrows)


def test_functions_stay_readable() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno <= 70, f"{path}: {node.name}"
