"""Pretrain in your own loop: token store, batches, model, engine, evaluation.

    python examples/own_loop.py

Under a launcher it trains on several ranks: torchrun --nproc_per_node 2 examples/own_loop.py
"""

import sys
import tempfile
from pathlib import Path

import electra_ds

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())

# The text. To open an existing store, use electra_ds.open_store(path).
texts = folder / "texts"
texts.mkdir(exist_ok=True)
for number in range(40):
    lines = [f"Text {number} has line {line}, and line {line} has words." for line in range(20)]
    (texts / f"{number}.txt").write_text("\n".join(lines))
recipe = electra_ds.load_recipe(
    {
        "extends": "tiny",
        "global_batch_size": 8,
        "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
        "schedule": {"total_steps": 30},
        "tokenizer": {"vocab_size": 400},
    }
)
store = electra_ds.build_data(texts, folder / "store", recipe=recipe, workers=1)

# The model is a torch module: you can change it, freeze parts of it, or load weights into it.
model = electra_ds.build_model(recipe, store)
print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")

with electra_ds.open_engine(recipe, store, model=model, ds_config="cpu") as engine:
    for step, batch in electra_ds.batches(recipe, store):
        result = engine.train_step(batch, step)
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}: " + ", ".join(f"{name} {value.item():.3f}" for name, value in result.items()))
    for name, value in electra_ds.evaluate(engine, recipe, store, windows=16).items():
        print(f"{name} {value:.3f}")
