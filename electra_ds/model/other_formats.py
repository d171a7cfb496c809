"""Recognise weights of other frameworks by their file names, without reading them, and say how to convert them."""

from __future__ import annotations

from pathlib import Path

from electra_ds.core.errors import DataError
from electra_ds.core.files import is_hub_model
from electra_ds.core.program import command

_OURS = ("*.safetensors", "pytorch_model*.bin")
_BY_TRANSFORMERS = {
    "tf_model*.h5": ("TensorFlow", "tensorflow", "from_tf"),
    "flax_model*.msgpack": ("Flax", "flax", "from_flax"),
}
_GRAPHS = {"saved_model.pb": "a TensorFlow SavedModel", "*.onnx": "an ONNX model", "*.gguf": "a GGUF model"}


def refuse_other_frameworks(path: Path, name: str) -> None:
    """Raise DataError if the file or folder called `name` holds weights of another framework and none of PyTorch. The
    message says how to convert it."""
    found = _other_framework(path, name)
    if found is not None:
        raise DataError(
            f"{name} is {found} Give the converted folder NEW to {command('pretrain')} --init-from or "
            f"{command('finetune')} --model."
        )


def _other_framework(path: Path, name: str) -> str | None:
    """Return the kind of weights and how to convert them, or None for anything else."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError:  # the error is reported when the file is read
        return None
    if any(file.match(pattern) for file in files for pattern in _OURS):
        return None
    if prefix := _tensorflow_prefix(path):
        return (
            f"a TensorFlow checkpoint, as google-research/electra writes it; PyTorch weights are needed. In another "
            f"environment: pip install 'transformers<5' torch tensorflow, then\n"
            f"  python -m transformers.models.electra.convert_electra_original_tf_checkpoint_to_pytorch \\\n"
            f"    --tf_checkpoint_path {prefix} --config_file NEW/config.json \\\n"
            f"    --pytorch_dump_path NEW/pytorch_model.bin --discriminator_or_generator discriminator\n"
            f"Write NEW/config.json first: take that of google/electra-small-discriminator on the Hub, with this "
            f"model's sizes. Put the model's vocab.txt into NEW too."
        )
    for pattern, kind in _GRAPHS.items():
        if any(file.match(pattern) for file in files):
            return f"{kind}, which is a graph and not only weights. Convert the checkpoint that it was made from."
    for pattern, (framework, package, switch) in _BY_TRANSFORMERS.items():
        if any(file.match(pattern) and file.is_file() for file in files):
            source = path if path.is_dir() else path.parent
            return f"a model with {framework} weights only. {_by_older_transformers(str(source), package, switch)}"
    if is_hub_model(name) and any(file.name == "config.json" for file in files):  # such weights are never downloaded
        advice = _by_older_transformers(name, "tensorflow", "from_tf")
        return f"a model without PyTorch weights. If its page lists tf_model.h5, convert that: {advice}"
    return None


def _tensorflow_prefix(path: Path) -> Path | None:
    """Return the prefix of a TensorFlow checkpoint, PREFIX.index and PREFIX.data-00000-of-00001, which is given, or one
    of whose files is; in a folder, that of the newest one."""
    if path.is_dir():
        indices = sorted(path.glob("*.index"), key=lambda file: file.stat().st_mtime, reverse=True)
        prefixes = [index.with_suffix("") for index in indices]
    else:
        prefixes = [path, path.with_suffix("")]
    for prefix in prefixes:
        if prefix.with_name(f"{prefix.name}.index").is_file() and any(prefix.parent.glob(f"{prefix.name}.data-*")):
            return prefix
    return None


def _by_older_transformers(source: str, package: str, switch: str) -> str:
    return (
        f"transformers 5 reads only PyTorch weights. In another environment: pip install 'transformers<5' torch "
        f"{package}, then\n"
        f'  python -c "from transformers import AutoModelForPreTraining as M; '
        f"M.from_pretrained('{source}', {switch}=True).save_pretrained('NEW')\"\n"
        f"(AutoModelForMaskedLM for a generator), and copy the tokenizer's files to NEW."
    )
