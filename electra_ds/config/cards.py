"""GPUs: their makers' figures (peak rates of matrix products, memory, bandwidth), and what each can run.

Rates are dense (without structured sparsity) and at the boost clock, as the maker prints them. fp16 means fp16 inputs
with sums in fp32 on tensor cores, as torch multiplies; GeForce cards do that at half the rate of sums in fp16.
Laptop cards are not listed: they share their names with faster desktop cards, and their clocks depend on the laptop.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from electra_ds.config.shipped import ds_config_names

TRITON_CAPABILITY = (7, 0)
"""The oldest compute capability that Triton, and thus torch.compile, generates code for."""
BF16_CAPABILITY = (8, 0)
"""The oldest capability with bf16 products; torch emulates them on older ones, slower than fp32."""
FLASH_CAPABILITY = (8, 0)
"""The oldest capability for torch's flash attention (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""
TENSOR_CORE_CAPABILITY = (7, 0)
DEFAULT_TORCH_CAPABILITY = (7, 5)
"""The oldest capability that torch's default builds have code for; older ones need the build for CUDA 12.6."""
_DISPLAY_GIB = 0.8  # assumed, for a desktop, a browser and the driver
SHOWN_SHARE = 0.91  # of the memory as sold: the smallest known share, a T4's with error correction (14.6 to 14.7 GiB)
_IGNORED_WORDS = {"nvidia", "geforce", "tesla", "generation"}


@dataclass(frozen=True)
class Card:
    name: str
    """The name that `torch.cuda.get_device_name` shows. If two sizes share a name, that of the larger one ends in its
    size."""
    memory_gib: float
    """Memory as sold; a driver shows 1 to 9 % less."""
    capability: tuple[int, int]
    fp32_tflops: float
    """Rate of the ordinary cores, without TF32, which torch does not use by default."""
    fp16_tflops: float | None
    """Rate of the tensor cores; None if there are none, so that torch computes in fp32."""
    bf16_tflops: float | None
    bandwidth_gb_s: float
    """Bandwidth of the card's memory, in 1e9 bytes/s."""
    aliases: tuple[str, ...] = ()
    """Other names, including that of the DeepSpeed JSON made for the card."""
    has_display: bool = False
    """Whether a monitor is usually connected, which takes some of the memory."""

    @property
    def usable_gib(self) -> float:
        """The memory that a program can use, with a display connected."""
        return self.memory_gib - _DISPLAY_GIB if self.has_display else self.memory_gib * SHOWN_SHARE

    @property
    def ds_config(self) -> str | None:
        """The name of the shipped DeepSpeed JSON that was made for the card."""
        return next((alias for alias in self.aliases if alias in ds_config_names()), None)


def has_slow_fp16(name: str) -> bool:
    """Return whether fp16 products are slower than fp32 (pytorch#121957), as on Turing without tensor cores: GTX 16xx
    and its relatives for workstations and laptops."""
    return re.search(r"\b(GTX 16\d\d|T[456][05]0|T1[02]00|MX[45]50)\b", name) is not None


def _geforce(
    capability: tuple[int, int], tensor: float | None, *rows: tuple[str, float, int, float, int, float]
) -> list[Card]:
    """Return the cards of a generation.

    rows: name, GiB, cores, boost clock in GHz, width of the memory bus in bits, Gbit/s per bit, all from NVIDIA's
    product pages. A core multiplies and adds once per cycle. tensor: the rate of the tensor cores with sums in fp32,
    divided by the rate of the cores; None if there are no tensor cores.
    """
    cards = []
    for name, memory_gib, cores, clock_ghz, bus_bits, gbit_s in rows:
        fp32 = cores * 2 * clock_ghz / 1000
        fp16 = None if tensor is None else round(tensor * fp32, 1)
        slow = has_slow_fp16(name)
        cards.append(
            Card(
                f"NVIDIA GeForce {name}", memory_gib, capability, round(fp32, 1), _GTX_16_FP16 if slow else fp16,
                fp16 if capability >= BF16_CAPABILITY else None, round(bus_bits * gbit_s / 8),
                _JSON_OF.get(name, ()), has_display=True,
            )
        )  # fmt: skip
    return cards


_JSON_OF = {
    "GTX 1060 6GB": ("gtx1060-6gb",), "GTX 1080 Ti": ("gtx1080ti-11gb",), "RTX 2060": ("rtx2060-6gb",),
    "RTX 3090": ("rtx3090-24gb",),
}  # fmt: skip
_GTX_16_FP16 = 0.5  # with torch: measured by users (pytorch#121957), assumed for all of them


def _board(
    name: str, memory_gib: float, capability: tuple[int, int], fp32: float, half: float, bandwidth: float
) -> Card:
    """Return a card for workstations or servers from its data sheet. half: the rate of fp16 and bf16, in TFLOP/s; half
    of the printed rate if that counts sparsity."""
    return Card(name, memory_gib, capability, fp32, half, half if capability >= BF16_CAPABILITY else None, bandwidth)


# NVIDIA, "Tesla P100 PCIe" and "Tesla P100 SXM2" data sheets (2016).
_P100 = Card("Tesla P100-PCIE-16GB", 16, (6, 0), 9.3, None, None, 732, ("p100-16gb",))
# NVIDIA, "Tesla V100" data sheet (2018): tensor cores 112 (PCIe) and 125 (SXM2); "V100S" (2019).
_V100 = Card("Tesla V100-SXM2-16GB", 16, (7, 0), 15.7, 125, None, 900, ("v100-16gb",))
_V100_PCIE = replace(_V100, name="Tesla V100-PCIE-16GB", fp32_tflops=14.0, fp16_tflops=112, aliases=())
# NVIDIA, "A100 Tensor Core GPU" data sheet (2021): the same rates in every form, bandwidth by form.
_A100 = Card("NVIDIA A100-SXM4-40GB", 40, (8, 0), 19.5, 312, 312, 1555, ("A100-PCIE-40GB", "a100-40gb"))

CARDS = (
    # Pascal has no tensor cores.
    *_geforce(
        (6, 1),
        None,
        ("GTX 1050 Ti", 4, 768, 1.392, 128, 7),
        ("GTX 1060 6GB", 6, 1280, 1.708, 192, 8),
        ("GTX 1070", 8, 1920, 1.683, 256, 8),
        ("GTX 1070 Ti", 8, 2432, 1.683, 256, 8),
        ("GTX 1080", 8, 2560, 1.733, 256, 10),
        ("GTX 1080 Ti", 11, 3584, 1.582, 352, 11),
    ),
    # The same way: 3584 cores x 2 x 1.531 GHz, 384 bit at 10 Gbit/s; 3840 x 2 x 1.582 GHz, 384 bit at 11.4 Gbit/s.
    Card("NVIDIA TITAN X (Pascal)", 12, (6, 1), 11.0, None, None, 480, has_display=True),
    Card("NVIDIA TITAN Xp", 12, (6, 1), 12.1, None, None, 548, has_display=True),
    # Turing without tensor cores.
    *_geforce(
        (7, 5),
        None,
        ("GTX 1650", 4, 896, 1.665, 128, 8),
        ("GTX 1650 SUPER", 4, 1280, 1.725, 128, 12),
        ("GTX 1660", 6, 1408, 1.785, 192, 8),
        ("GTX 1660 SUPER", 6, 1408, 1.785, 192, 14),
        ("GTX 1660 Ti", 6, 1536, 1.770, 192, 12),
    ),
    # Turing white paper (2018), appendix A: tensor cores 8 times the cores' rate, half of that for sums in fp32 (RTX
    # 2080 Ti: 13.4 and 53.8); assumed for the cards that it does not list.
    *_geforce(
        (7, 5),
        4,
        ("RTX 2060", 6, 1920, 1.680, 192, 14),
        ("RTX 2060 SUPER", 8, 2176, 1.650, 256, 14),
        ("RTX 2070", 8, 2304, 1.620, 256, 14),
        ("RTX 2070 SUPER", 8, 2560, 1.770, 256, 14),
        ("RTX 2080", 8, 2944, 1.710, 256, 14),
        ("RTX 2080 SUPER", 8, 3072, 1.815, 256, 15.5),
        ("RTX 2080 Ti", 11, 4352, 1.545, 352, 14),
    ),
    # The same white paper: the full rate for sums in fp32.
    replace(_board("NVIDIA TITAN RTX", 24, (7, 5), 16.3, 130.5, 672), has_display=True),
    replace(_board("Quadro RTX 6000", 24, (7, 5), 16.3, 130.5, 672), has_display=True),
    replace(_board("Quadro RTX 8000", 48, (7, 5), 16.3, 130.5, 672), has_display=True),
    # "Ampere GA102 GPU architecture" white paper (2020), appendix A: fp16 and bf16 with sums in fp32 at twice the
    # cores' rate (RTX 3080: 29.8 and 59.5; RTX 3090: 35.6 and 71).
    *_geforce(
        (8, 6),
        2,
        ("RTX 3050", 8, 2560, 1.777, 128, 14),
        ("RTX 3060", 12, 3584, 1.777, 192, 15),
        ("RTX 3060 Ti", 8, 4864, 1.665, 256, 14),
        ("RTX 3070", 8, 5888, 1.725, 256, 14),
        ("RTX 3070 Ti", 8, 6144, 1.770, 256, 19),
        ("RTX 3080", 10, 8704, 1.710, 320, 19),
        ("RTX 3080 12GB", 12, 8960, 1.710, 384, 19),
        ("RTX 3080 Ti", 12, 10240, 1.665, 384, 19),
        ("RTX 3090", 24, 10496, 1.695, 384, 19.5),
        ("RTX 3090 Ti", 24, 10752, 1.860, 384, 21),
    ),
    # "Ada GPU architecture" white paper (2022), appendix A: twice the cores' rate (RTX 4090: 82.6 and 165.2).
    *_geforce(
        (8, 9),
        2,
        ("RTX 4060", 8, 3072, 2.460, 128, 17),
        ("RTX 4060 Ti", 8, 4352, 2.535, 128, 18),
        ("RTX 4060 Ti 16GB", 16, 4352, 2.535, 128, 18),
        ("RTX 4070", 12, 5888, 2.475, 192, 21),
        ("RTX 4070 SUPER", 12, 7168, 2.475, 192, 21),
        ("RTX 4070 Ti", 12, 7680, 2.610, 192, 21),
        ("RTX 4070 Ti SUPER", 16, 8448, 2.610, 256, 21),
        ("RTX 4080", 16, 9728, 2.505, 256, 22.4),
        ("RTX 4080 SUPER", 16, 10240, 2.550, 256, 23),
        ("RTX 4090", 24, 16384, 2.520, 384, 21),
    ),
    # "RTX Blackwell GPU architecture" white paper (2025), appendix A: twice the cores' rate (RTX 5090: 104.8 and
    # 209.5).
    *_geforce(
        (12, 0),
        2,
        ("RTX 5050", 8, 2560, 2.572, 128, 20),
        ("RTX 5060", 8, 3840, 2.497, 128, 28),
        ("RTX 5060 Ti", 8, 4608, 2.572, 128, 28),
        ("RTX 5060 Ti 16GB", 16, 4608, 2.572, 128, 28),
        ("RTX 5070", 12, 6144, 2.512, 192, 28),
        ("RTX 5070 Ti", 16, 8960, 2.452, 256, 28),
        ("RTX 5080", 16, 10752, 2.617, 256, 30),
        ("RTX 5090", 32, 21760, 2.407, 512, 28),
    ),
    # The data sheets of NVIDIA's cards for workstations (2021, 2022).
    *(
        replace(card, has_display=True, aliases=(card.name.removeprefix("NVIDIA RTX "),))
        for card in (
            _board("NVIDIA RTX A2000", 6, (8, 6), 8.0, 31.9, 288),
            _board("NVIDIA RTX A2000 12GB", 12, (8, 6), 8.0, 31.9, 288),
            _board("NVIDIA RTX A4000", 16, (8, 6), 19.2, 76.7, 448),
            _board("NVIDIA RTX A4500", 20, (8, 6), 23.7, 94.6, 640),
            _board("NVIDIA RTX A5000", 24, (8, 6), 27.8, 111.1, 768),
            _board("NVIDIA RTX A6000", 48, (8, 6), 38.7, 154.8, 768),
            _board("NVIDIA RTX 6000 Ada Generation", 48, (8, 9), 91.1, 364.2, 960),
        )
    ),
    # "Tesla P4" and "Tesla P40" data sheets (2016): 5.5 and 12 TFLOP/s.
    Card("Tesla P4", 8, (6, 1), 5.5, None, None, 192),
    Card("Tesla P40", 24, (6, 1), 12.0, None, None, 346),
    _P100,
    replace(_P100, name="Tesla P100-SXM2-16GB", fp32_tflops=10.6, aliases=()),
    _V100,
    replace(_V100, name="Tesla V100-SXM2-32GB", memory_gib=32, aliases=()),
    _V100_PCIE,
    replace(_V100_PCIE, name="Tesla V100-PCIE-32GB", memory_gib=32),
    _board("Tesla V100S-PCIE-32GB", 32, (7, 0), 16.4, 130, 1134),
    # "TITAN V" (2017): 5120 cores x 2 x 1.455 GHz, 110 TFLOP/s of the tensor cores.
    replace(_board("NVIDIA TITAN V", 12, (7, 0), 14.9, 110, 653), has_display=True),
    # "T4" data sheet (2019). That the 65 TFLOP/s hold for sums in fp32 is assumed.
    Card("Tesla T4", 16, (7, 5), 8.1, 65, None, 320, ("t4-16gb",)),
    # The data sheets of NVIDIA's cards for servers, one by one; an A16 is four GPUs, of which this is one.
    _board("NVIDIA A2", 16, (8, 6), 4.5, 18, 200),
    _board("NVIDIA A10", 24, (8, 6), 31.2, 125, 600),
    _board("NVIDIA A10G", 24, (8, 6), 35, 70, 600),
    _board("NVIDIA A16", 16, (8, 6), 4.5, 17.9, 200),
    _board("NVIDIA A30", 24, (8, 0), 10.3, 165, 933),
    _board("NVIDIA A40", 48, (8, 6), 37.4, 149.7, 696),
    _board("NVIDIA L4", 24, (8, 9), 30.3, 121, 300),
    _board("NVIDIA L40", 48, (8, 9), 90.5, 181, 864),
    _board("NVIDIA L40S", 48, (8, 9), 91.6, 362, 864),
    _A100,
    replace(_A100, name="NVIDIA A100-SXM4-80GB", memory_gib=80, bandwidth_gb_s=2039, aliases=()),
    replace(_A100, name="NVIDIA A100 80GB PCIe", memory_gib=80, bandwidth_gb_s=1935, aliases=()),
    # NVIDIA, "H100 Tensor Core GPU" data sheet (2023), halved where it counts sparsity.
    Card("NVIDIA H100 80GB HBM3", 80, (9, 0), 67, 989, 989, 3350, ("H100 SXM",)),
    Card("NVIDIA H100 PCIe", 80, (9, 0), 51, 756, 756, 2000),
    # NVIDIA, "H200 Tensor Core GPU" data sheet (2024), halved where it counts sparsity. The NVL form is slower.
    Card("NVIDIA H200", 141, (9, 0), 67, 989, 989, 4800, ("H200 SXM", "h200-141gb")),
    # NVIDIA, "HGX B200" data sheet (2024): an eighth of eight of them, halved where it counts sparsity.
    _board("NVIDIA B200", 180, (10, 0), 75, 2250, 8000),
)


def find_card(device_name: str) -> Card | None:
    """Return the card with this name, or None. Case, separators and words such as NVIDIA and GeForce are ignored.

    Every other word must match, since a "Ti", "SUPER" or "3GB" is another card.
    """
    wanted = _words(device_name)
    return next((card for card in CARDS if wanted in map(_words, (card.name, *card.aliases))), None)


def cards_like(name: str) -> list[Card]:
    """Return up to five cards whose names contain this name, or else the cards with the most similar names."""
    words, squeezed = _words(name), _squeezed(name)
    by_name = {_squeezed(card.name): card for card in CARDS}
    found = [other for other, card in by_name.items() if words and (words <= _words(card.name) or squeezed in other)]
    return [by_name[other] for other in found[:5] or difflib.get_close_matches(squeezed, by_name, n=5)]


def peak_flops(card: Card, precision: str) -> float | None:
    """Return the peak FLOP/s of matrix products in a precision, by its name in `Precision`; None if the card lacks it.

    Without tensor cores fp16 runs at the fp32 rate, because torch lets cuBLAS sum in fp32
    (aten/src/ATen/cuda/CUDABlas.cpp), not at the doubled rate of a P100 or the 1/64 rate of a GTX 1080 Ti.
    """
    tflops = {"fp32": card.fp32_tflops, "fp16": card.fp16_tflops or card.fp32_tflops, "bf16": card.bf16_tflops}
    rate = tflops[precision.removeprefix("autocast-")]
    return None if rate is None else rate * 1e12


class Lack(NamedTuple):
    """A feature that a card lacks, and the consequence for training."""

    what: str
    consequence: str


def lacks(name: str, capability: tuple[int, int]) -> list[Lack]:
    """Return the features that a card lacks."""
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
    """Return a note if the given precision is slow on a card, else None."""
    if not (has_slow_fp16(name) and precision in ("fp16", "autocast-fp16")):
        return None
    return f"fp16 is enabled on {name}, which has no tensor cores, so it is slower than fp32, as in cpu.json"


def _parts(name: str) -> list[str]:
    return re.findall(r"[a-z]+|[0-9]+", name.lower())


def _words(name: str) -> frozenset[str]:
    return frozenset(_parts(name)) - _IGNORED_WORDS


def _squeezed(name: str) -> str:
    return "".join(part for part in _parts(name) if part not in _IGNORED_WORDS)
