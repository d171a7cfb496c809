"""Pretrain in a plain PyTorch loop, on one GPU or CPU. Run the same command again to resume an interrupted run.

bin/build-data --corpus my_texts/ --recipe tiny --out stores/mine
python examples/plain_loop.py stores/mine runs/plain
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, get_linear_schedule_with_warmup

import electra_ds
from electra_ds import ElectraForJointPreTraining, StoreRows

parser = argparse.ArgumentParser()
parser.add_argument("store", type=Path, help="a token store of bin/build-data")
parser.add_argument("out", type=Path, help="the folder for checkpoints and the trained discriminator")
parser.add_argument("--steps", type=int, default=12_000)
given = parser.parse_args()
store, out, steps = given.store, given.out, given.steps
recipe = electra_ds.load_recipe("tiny", {"schedule.total_steps": steps})
schedule, checkpoint = recipe.schedule, out / "checkpoint.pt"
device = "cuda" if torch.cuda.is_available() else "cpu"
out.mkdir(parents=True, exist_ok=True)

torch.manual_seed(recipe.seed)  # of dropout
model = ElectraForJointPreTraining.from_recipe(recipe, AutoTokenizer.from_pretrained(store / "tokenizer")).to(device)
optimizer = model.make_optimizer()
scheduler = get_linear_schedule_with_warmup(optimizer, schedule.warmup_steps, schedule.total_steps)
parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
first = 0
if checkpoint.exists():
    saved = torch.load(checkpoint)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["dropout"])
    first = saved["step"]

rows = StoreRows(recipe, store)
left = range(first * recipe.global_batch_size, len(rows))
for step, batch in enumerate(DataLoader(rows, recipe.global_batch_size, sampler=left), first + 1):
    output = model.train()(**{name: value.to(device) for name, value in batch.items()})
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if step % max(1, steps // 10) == 0:
        print(f"step {step}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in output.losses.items()))
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**states, "step": step, "dropout": torch.get_rng_state()}, out / "incomplete.pt")
        (out / "incomplete.pt").replace(checkpoint)
model.networks()["discriminator"].save_pretrained(out / "discriminator")
