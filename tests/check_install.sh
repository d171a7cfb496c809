# Run by `make check-install` in a folder with a fresh environment in venv/: the installed command, far from a checkout.
# Nobody is logged in anywhere: HOME is an empty folder.
set -eu
mkdir home
export HOME="$PWD/home"
unset WANDB_API_KEY
mkdir corpus
for number in 1 2 3 4 5 6 7 8 9; do
  for line in $(seq 1 60); do echo "Line $line of text $number tells of a river, a mill, and the $line geese of the miller."; done > corpus/$number.txt
done
venv/bin/electra-ds --version
venv/bin/electra-ds doctor
venv/bin/electra-ds recipes tiny
venv/bin/electra-ds pretrain --corpus corpus --dry-run
venv/bin/electra-ds pretrain --ds-config cpu --recipe tiny --corpus corpus --run-dir run --eval-windows 16 \
  --wandb offline --tensorboard --set schedule.total_steps=5 schedule.warmup_steps=1 tokenizer.vocab_size=400
ls run/wandb/offline-run-*/run-*.wandb run/tensorboard/events.out.tfevents.*
venv/bin/electra-ds export run
venv/bin/python -c "from transformers import AutoModel, AutoTokenizer; AutoModel.from_pretrained('run/export/discriminator'); print(AutoTokenizer.from_pretrained('run/export/discriminator')('the miller').input_ids)"
venv/bin/electra-ds sweep smoke --dry-run
venv/bin/python -c "from electra_ds.sweep import trainable"
echo "a clean install works"
