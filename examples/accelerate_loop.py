"""Pretrain in your own loop with Accelerate. Run the same command again to resume an interrupted run.

    bin/build-data --corpus my_texts/ --recipe tiny --out stores/mine
    python examples/accelerate_loop.py stores/mine runs/accelerate

On several GPUs: accelerate launch examples/accelerate_loop.py stores/mine runs/accelerate
"""

import argparse
from pathlib import Path

from accelerate import Accelerator, skip_first_batches
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
schedule = recipe.schedule

accelerator = Accelerator(step_scheduler_with_optimizer=False)
model = ElectraForJointPreTraining.from_recipe(recipe, AutoTokenizer.from_pretrained(store / "tokenizer"))
optimizer = model.make_optimizer()
scheduler = get_linear_schedule_with_warmup(optimizer, schedule.warmup_steps, schedule.total_steps)
loader = DataLoader(StoreRows(recipe, store), recipe.global_batch_size // accelerator.num_processes)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

saved = sorted(out.glob("step-*"))
if saved:
    accelerator.load_state(saved[-1])
first = int(saved[-1].name.removeprefix("step-")) if saved else 0
for step, batch in enumerate(skip_first_batches(loader, first), first + 1):
    output = model(**batch)
    accelerator.backward(output.loss)
    accelerator.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if step % max(1, steps // 10) == 0:
        accelerator.print(f"step {step}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in output.losses.items()))
        accelerator.save_state(out / "incomplete")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (out / "incomplete").rename(out / f"step-{step:08}")
accelerator.unwrap_model(model).networks()["discriminator"].save_pretrained(out / "discriminator")
