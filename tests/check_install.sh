# Run by `make check-install` in a folder with a fresh environment in venv/: the installed command, far from a checkout.
set -eu
mkdir corpus
for number in 1 2 3 4 5 6 7 8 9; do
  for line in $(seq 1 60); do echo "Line $line of text $number tells of a river, a mill, and the $line geese of the miller."; done > corpus/$number.txt
done
venv/bin/electra-ds --version
venv/bin/electra-ds pretrain --ds-config cpu.json --recipe tiny --corpus corpus --run-dir run --eval-windows 16 \
  --set schedule.total_steps=5 schedule.warmup_steps=1 tokenizer.vocab_size=400
venv/bin/electra-ds export run
venv/bin/python -c "from transformers import AutoModel, AutoTokenizer; AutoModel.from_pretrained('run/export/discriminator'); print(AutoTokenizer.from_pretrained('run/export/discriminator')('the miller').input_ids)"
echo "a clean install works"
