"""Pretrain with Lightning. Run the same command again to resume an interrupted run.

pip install lightning    # without its extra `strategies`, which asks for an old DeepSpeed
bin/build-data --corpus my_texts/ --recipe tiny --out stores/mine
python examples/lightning_module.py stores/mine runs/lightning
"""

import argparse
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, get_linear_schedule_with_warmup

import electra_ds
from electra_ds import ElectraForJointPreTraining, StoreRows


class Pretraining(lightning.LightningModule):
    def __init__(self, recipe, tokenizer):
        super().__init__()
        self.model = ElectraForJointPreTraining.from_recipe(recipe, tokenizer)

    def training_step(self, batch, index):
        output = self.model.train()(**batch)
        self.log_dict(output.losses, prog_bar=True)
        return output.loss

    def configure_optimizers(self):
        optimizer, schedule = self.model.make_optimizer(), self.model.recipe.schedule
        scheduler = get_linear_schedule_with_warmup(optimizer, schedule.warmup_steps, schedule.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Rows(lightning.LightningDataModule):
    def __init__(self, recipe, store):
        super().__init__()
        self.rows, self.batch = StoreRows(recipe, store), recipe.global_batch_size

    def train_dataloader(self):  # a resumed run begins with the rows that it has not seen
        left = range(self.trainer.global_step * self.batch, len(self.rows))
        return DataLoader(self.rows, self.batch // self.trainer.world_size, sampler=left)


parser = argparse.ArgumentParser()
parser.add_argument("store", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--steps", type=int, default=12_000)
given = parser.parse_args()
store, out, steps = given.store, given.out, given.steps
recipe = electra_ds.load_recipe("tiny", {"schedule.total_steps": steps})
module = Pretraining(recipe, AutoTokenizer.from_pretrained(store / "tokenizer"))
saves = ModelCheckpoint(out, save_last=True, every_n_train_steps=max(1, steps // 10), save_top_k=0)
clip = recipe.optimizer.max_grad_norm
trainer = lightning.Trainer(max_steps=steps, callbacks=[saves], gradient_clip_val=clip, logger=False)
last = out / "last.ckpt"
trainer.fit(module, Rows(recipe, store), ckpt_path=last if last.exists() else None, weights_only=False)
module.model.networks()["discriminator"].save_pretrained(out / "discriminator")
