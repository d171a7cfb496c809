"""The parts of a pretraining, for your own training loop.

recipe = load_recipe("tiny", {"schedule.total_steps": 100})
store = open_store("stores/mine")
with open_engine(recipe, store, ds_config="cpu") as engine:
    for step, batch in batches(recipe, store):
        result = engine.train_step(batch, step)
    print(evaluate(engine, recipe, store))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from electra_ds.config.options import Compile, PretrainOptions
from electra_ds.config.recipe import Recipe, RecipeSource, load_recipe
from electra_ds.core import devices
from electra_ds.core.errors import ConfigError
from electra_ds.core.ranks import join_ranks
from electra_ds.data.token_store import TokenStore, split_holdout
from electra_ds.pretraining.batches import BatchBuilder, objective_of
from electra_ds.pretraining.engine import PretrainingEngine
from electra_ds.pretraining.evaluation import Evaluator
from electra_ds.pretraining.objectives.base import PretrainingBatch
from electra_ds.training.prepare import plan_for
from electra_ds.training.step import AutocastModel, prefetched


def open_store(path: str | Path) -> TokenStore:
    """Return the token store in a folder. Raises DataError if it is missing or damaged."""
    return TokenStore(Path(path))


def _opened(recipe: RecipeSource, store: TokenStore | str | Path) -> tuple[Recipe, TokenStore]:
    """Return a recipe and a store that may be given by name and path."""
    return load_recipe(recipe), store if isinstance(store, TokenStore) else open_store(store)


def batches(
    recipe: RecipeSource, store: TokenStore | str | Path, first_step: int = 0
) -> Iterator[tuple[int, PretrainingBatch]]:
    """Yield each step's number, counted from 0, and its global batch, to the end of the recipe's schedule.

    A batch depends only on recipe, store and step: a loop that begins at `first_step` gets the same batches as one from
    the start. Raises DataError if the store has too little text for a held-out part.
    """
    recipe, store = _opened(recipe, store)
    split = split_holdout(store.documents, recipe.data, recipe.seed)
    builder = BatchBuilder(store, split.train, recipe, recipe.seed)
    yield from prefetched(builder, first_step, recipe.schedule.total_steps)


def build_model(recipe: RecipeSource, store: TokenStore | str | Path) -> AutocastModel:
    """Return the module that the recipe's objective trains, with initial weights from the recipe's seed."""
    recipe, store = _opened(recipe, store)
    return objective_of(recipe, store.tokenizer).build_model()


@contextmanager
def open_engine(
    recipe: RecipeSource,
    store: TokenStore | str | Path,
    *,
    model: AutocastModel | None = None,
    ds_config: str | Path | None = None,
    micro_batch: int | Literal["auto"] | None = None,
    compile: Compile = "off",
) -> Iterator[PretrainingEngine]:
    """Open a DeepSpeed engine, and close it at the end of the context. Under a launcher every rank opens one.

    `engine.train_step(batch, step)` does one optimizer step, with the learning rate of the recipe's schedule at that
    step, and returns its losses and the gradient norm by name, as scalars on the device. `engine.optimizer` has
    `snapshot()` and `load()`.

    Args:
        recipe: the recipe, or its name, path or values.
        store: the token store, whose tokenizer the model uses, or its path.
        model: the module to train. By default the result of `build_model`.
        ds_config: a shipped DeepSpeed JSON such as `cpu`, or a path. By default the one for this hardware.
        micro_batch: sequences at a time, instead of the JSON's value.
        compile: `on`, `off` or `auto`: compile the forward pass.

    Raises:
        ConfigError: the DeepSpeed JSON cannot be used with this recipe or device.
    """
    recipe, store = _opened(recipe, store)
    required = recipe.required_weights
    if model is None and required is not None:
        raise ConfigError(
            f"The objective {recipe.objective} needs a trained {required}: load its weights into a model, and pass it "
            f"as `model`."
        )
    options = PretrainOptions(ds_config=None if ds_config is None else str(ds_config), micro_batch=micro_batch)
    with join_ranks() as ranks:
        with ranks.fail_together():
            plan = plan_for(options, recipe, ranks)
            device = devices.device(ranks.launch)
            engine = PretrainingEngine(model or build_model(recipe, store), recipe, plan, device, compile)
        try:
            yield engine
        finally:
            engine.close()


def evaluate(
    engine: PretrainingEngine, recipe: RecipeSource, store: TokenStore | str | Path, windows: int = 512
) -> Mapping[str, float]:
    """Return the model's metrics on held-out text by name. All ranks must call it.

    windows: the number of held-out sequences.
    """
    recipe, store = _opened(recipe, store)
    split = split_holdout(store.documents, recipe.data, recipe.seed)
    with join_ranks() as ranks:
        evaluator = Evaluator(store, split, recipe, windows, ranks)
        rows = engine.plan.batch.micro_batch_size
        return evaluator(engine.evaluate, engine.device, rows)
