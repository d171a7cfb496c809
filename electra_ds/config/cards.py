"""GPUs: what their makers say of them (peak rates of matrix products, memory, bandwidth), and what each can run.

Rates are dense (without structured sparsity) and at the boost clock, as the maker prints them. fp16 means fp16 inputs
summed in fp32 on tensor cores, which is how torch multiplies.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from electra_ds.config.shipped import ds_config_names

TRITON_CAPABILITY = (7, 0)
"""The oldest compute capability that Triton, and so torch.compile, makes code for."""
BF16_CAPABILITY = (8, 0)
"""The oldest that multiplies bf16 matrices; torch emulates it on older ones, slower than fp32."""
FLASH_CAPABILITY = (8, 0)
"""The oldest that torch's flash attention runs on (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""
TENSOR_CORE_CAPABILITY = (7, 0)
DEFAULT_TORCH_CAPABILITY = (7, 5)
"""The oldest that torch's default builds have code for; older ones need the build for CUDA 12.6."""
_DISPLAY_GIB = 0.8  # assumed: a desktop, a browser and what the driver keeps
SHOWN_SHARE = 0.91  # of what is sold; the least that is known of, a T4's with error correction (14.6 to 14.7 GiB)
_MAKERS_WORDS = {"nvidia", "geforce", "tesla"}


@dataclass(frozen=True)
class Card:
    name: str
    """As `torch.cuda.get_device_name` shows it."""
    memory_gib: float
    """As it is sold; a driver shows 1 to 9 % less."""
    capability: tuple[int, int]
    fp32_tflops: float
    """Of the ordinary cores, without TF32, which torch leaves off."""
    fp16_tflops: float | None
    """Of the tensor cores; None where there are none and torch computes in fp32."""
    bf16_tflops: float | None
    bandwidth_gb_s: float
    """Of the card's memory, in 1e9 bytes/s."""
    aliases: tuple[str, ...] = ()
    """Other names, the DeepSpeed JSON made for it among them."""
    has_display: bool = False
    """Whether people plug a monitor into it, which then takes some of its memory."""

    @property
    def usable_gib(self) -> float:
        """What is left to a program, the display attached."""
        return self.memory_gib - _DISPLAY_GIB if self.has_display else self.memory_gib * SHOWN_SHARE

    @property
    def ds_config(self) -> str | None:
        """The shipped DeepSpeed JSON that was made for it."""
        return next((alias for alias in self.aliases if alias in ds_config_names()), None)


# NVIDIA, "Tesla P100 PCIe" and "Tesla P100 SXM2" data sheets (2016).
_P100 = Card("Tesla P100-PCIE-16GB", 16, (6, 0), 9.3, None, None, 732, ("p100-16gb",))
# NVIDIA, "Tesla V100" data sheet (2018): tensor cores 112 (PCIe) and 125 (SXM2).
_V100 = Card("Tesla V100-SXM2-16GB", 16, (7, 0), 15.7, 125, None, 900, ("v100-16gb",))
# NVIDIA, "A100 Tensor Core GPU" data sheet (2021): the same rates in every form, bandwidth by form.
_A100 = Card("NVIDIA A100-SXM4-40GB", 40, (8, 0), 19.5, 312, 312, 1555, ("A100-PCIE-40GB", "a100-40gb"))

CARDS = (
    # No data sheet gives rates: 1280 cores x 2 x 1.708 GHz, 192-bit memory at 8 Gbit/s, of NVIDIA's product page.
    Card("NVIDIA GeForce GTX 1060 6GB", 6, (6, 1), 4.4, None, None, 192, ("gtx1060-6gb",), has_display=True),
    # The same way: 3584 cores x 2 x 1.582 GHz, 352 bit at 11 Gbit/s.
    Card("NVIDIA GeForce GTX 1080 Ti", 11, (6, 1), 11.3, None, None, 484, ("gtx1080ti-11gb",), has_display=True),
    # The same way: 896 cores x 2 x 1.665 GHz, 128 bit at 8 Gbit/s; 1536 x 2 x 1.77 GHz, 192 bit at 12 Gbit/s.
    # Their fp16 as torch multiplies it is what users measured (pytorch#121957).
    Card("NVIDIA GeForce GTX 1650", 4, (7, 5), 3.0, 0.5, None, 128, has_display=True),
    Card("NVIDIA GeForce GTX 1660 Ti", 6, (7, 5), 5.4, 0.5, None, 288, has_display=True),
    # The same way: 1920 cores x 2 x 1.68 GHz, 192 bit at 14 Gbit/s. Tensor cores: 240 x 64 x 2 x 1.68 GHz = 51.6,
    # halved for sums in fp32, as the Turing white paper (2018) has it for other GeForce cards; assumed for this one.
    Card("NVIDIA GeForce RTX 2060", 6, (7, 5), 6.5, 25.8, None, 336, ("rtx2060-6gb",), has_display=True),
    # NVIDIA, "T4" data sheet (2019). That the 65 TFLOP/s hold for sums in fp32 is assumed.
    Card("Tesla T4", 16, (7, 5), 8.1, 65, None, 320, ("t4-16gb",)),
    _P100,
    replace(_P100, name="Tesla P100-SXM2-16GB", fp32_tflops=10.6, aliases=()),
    _V100,
    replace(_V100, name="Tesla V100-PCIE-16GB", fp32_tflops=14.0, fp16_tflops=112, aliases=()),
    # NVIDIA, "Ampere GA102 GPU architecture" white paper, appendix A (2020): fp16 and bf16 with fp32 accumulate.
    Card("NVIDIA GeForce RTX 3090", 24, (8, 6), 35.6, 71, 71, 936, ("rtx3090-24gb",), has_display=True),
    _A100,
    replace(_A100, name="NVIDIA A100-SXM4-80GB", memory_gib=80, bandwidth_gb_s=2039, aliases=()),
    replace(_A100, name="NVIDIA A100 80GB PCIe", memory_gib=80, bandwidth_gb_s=1935, aliases=()),
    # NVIDIA, "H100 Tensor Core GPU" data sheet (2023), halved where it counts sparsity.
    Card("NVIDIA H100 80GB HBM3", 80, (9, 0), 67, 989, 989, 3350, ("H100 SXM",)),
    Card("NVIDIA H100 PCIe", 80, (9, 0), 51, 756, 756, 2000),
    # NVIDIA, "H200 Tensor Core GPU" data sheet (2024), halved where it counts sparsity. The NVL form is slower.
    Card("NVIDIA H200", 141, (9, 0), 67, 989, 989, 4800, ("H200 SXM", "h200-141gb")),
)


def find_card(device_name: str) -> Card | None:
    """The card of this name, whatever its case, separators and maker's words; None for one that is not known.

    Every other word must agree, since a "Ti", "SUPER" or "3GB" is another card.
    """
    wanted = _words(device_name)
    return next((card for card in CARDS if wanted in map(_words, (card.name, *card.aliases))), None)


def cards_like(name: str) -> list[Card]:
    """Those whose names have all of these words, or have it within when nothing stands between the words."""
    words, squeezed = _words(name), "".join(_parts(name))
    return [card for card in CARDS if words and (words <= _words(card.name) or squeezed in "".join(_parts(card.name)))]


def peak_flops(card: Card, precision: str) -> float | None:
    """Peak FLOP/s of matrix products in one of `config.precision.Precision`'s names; None where the card lacks it.

    Without tensor cores fp16 runs at the fp32 rate: torch has cuBLAS sum it in fp32 (aten/src/ATen/cuda/CUDABlas.cpp),
    so neither the doubled rate of a P100 nor the 1/64 of a GTX 1080 Ti is met.
    """
    tflops = {"fp32": card.fp32_tflops, "fp16": card.fp16_tflops or card.fp32_tflops, "bf16": card.bf16_tflops}
    rate = tflops[precision.removeprefix("autocast-")]
    return None if rate is None else rate * 1e12


class Lack(NamedTuple):
    """Something that newer cards have."""

    what: str
    consequence: str


def has_slow_fp16(name: str) -> bool:
    """Turing without tensor cores, GTX 16xx and its siblings for workstations and laptops: fp16 products run at a
    fraction of the rate of fp32 (pytorch#121957)."""
    return re.search(r"\b(GTX 16\d\d|T[456][05]0|T1[02]00|MX[45]50)\b", name) is not None


def lacks(name: str, capability: tuple[int, int]) -> list[Lack]:
    """What a card cannot do, and what follows from it for training."""
    found = []
    if has_slow_fp16(name):
        found.append(Lack("tensor cores", 'fp16 is slower than fp32: take fp32, as in cpu.json, or "enabled": "auto"'))
    elif capability < TENSOR_CORE_CAPABILITY:
        found.append(Lack("tensor cores", "fp16 saves memory, hardly time: its products are computed in fp32"))
    if capability < BF16_CAPABILITY:
        found.append(Lack("bf16", "take fp16, which needs a loss scale, or fp32"))
    if capability < FLASH_CAPABILITY:
        found.append(Lack("flash attention", "the memory-efficient kernel takes its place: as small, but slower"))
    if capability < TRITON_CAPABILITY:
        found.append(Lack("torch.compile", "Triton needs 7.0, so the step runs as it is written"))
    return found


def slow_fp16_note(name: str, precision: str) -> str | None:
    """What to tell somebody whose card is slowed down by the precision that is asked for."""
    if not (has_slow_fp16(name) and precision in ("fp16", "autocast-fp16")):
        return None
    return f"fp16 is enabled on {name}, which has no tensor cores, so it is slower than fp32, as in cpu.json"


def _parts(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())


def _words(name: str) -> frozenset[str]:
    return frozenset(_parts(name)) - _MAKERS_WORDS
