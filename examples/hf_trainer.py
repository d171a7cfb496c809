"""Pretrain with transformers' Trainer. Run the same command again to resume an interrupted run.

    bin/build-data --corpus my_texts/ --recipe tiny --out stores/mine
    python examples/hf_trainer.py stores/mine runs/trainer

On several GPUs: torchrun --nproc_per_node 4 examples/hf_trainer.py stores/mine runs/trainer [--deepspeed ds.json]
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

import electra_ds
from electra_ds import ElectraForJointPreTraining, NamedLosses, StoreRows

parser = argparse.ArgumentParser()
parser.add_argument("store", help="a token store of bin/build-data")
parser.add_argument("out", help="the folder for checkpoints and the trained networks")
parser.add_argument("--recipe", default="tiny")
parser.add_argument("--steps", type=int, help="train for this many steps instead of the recipe's")
parser.add_argument("--deepspeed", help="a DeepSpeed JSON, with `auto` for what the recipe sets")
given = parser.parse_args()

recipe = electra_ds.load_recipe(given.recipe, {"schedule.total_steps": given.steps} if given.steps else {})
tokenizer = AutoTokenizer.from_pretrained(f"{given.store}/tokenizer")
model = ElectraForJointPreTraining.from_recipe(recipe, tokenizer)
tenth = max(1, recipe.schedule.total_steps // 10)
arguments = TrainingArguments(
    **model.training_arguments(),
    output_dir=given.out,
    train_sampling_strategy="sequential",  # the rows are in random order already
    logging_steps=tenth,
    eval_strategy="steps",
    eval_steps=tenth,
    save_steps=tenth,
    save_total_limit=2,
    report_to="none",
    deepspeed=given.deepspeed,
    use_cpu=not torch.cuda.is_available(),
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=StoreRows(recipe, given.store),
    eval_dataset=StoreRows(recipe, given.store, held_out_rows=256),
    processing_class=tokenizer,
    optimizers=(model.make_optimizer(), None),
    callbacks=[NamedLosses()],
)
finished = [path.parent for path in Path(given.out).glob("checkpoint-*/trainer_state.json")]  # which is written last
trainer.train(resume_from_checkpoint=str(max(finished, key=lambda path: path.stat().st_mtime)) if finished else None)
trainer.save_model()
for name, network in model.networks().items():  # plain transformers models
    if trainer.is_world_process_zero():
        network.save_pretrained(f"{given.out}/networks/{name}")
        tokenizer.save_pretrained(f"{given.out}/networks/{name}")
