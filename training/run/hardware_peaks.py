"""Peak FLOP/s of devices, the denominator of MFU: dense matrix products without sparsity."""

import re
import time
from functools import cache
from typing import Literal, NamedTuple

import torch

Precision = Literal["fp32", "bf16"]


class Peak(NamedTuple):
    """In TFLOP/s. `bf16` accumulates in fp32; without such units bf16 runs at the speed of fp32."""

    bf16: float
    tf32: float
    fp32: float


# Patterns of `torch.cuda.get_device_name`; the first match counts. Figures are from NVIDIA's data sheets (those with
# sparsity halved), for GeForce from the architecture white papers (GA102 appendix A, Ada appendix A, RTX Blackwell
# appendix A; tensor cores with fp32 accumulation), for AMD from the product page.
_KNOWN: tuple[tuple[str, Peak], ...] = (
    (r"GB200", Peak(2500, 1250, 80)),
    (r"B200", Peak(2250, 1100, 75)),
    (r"H200 NVL", Peak(835, 417, 60)),
    (r"GH200|H200", Peak(989, 494, 67)),
    (r"H100 NVL", Peak(835, 417, 60)),
    (r"H100 PCIe", Peak(756, 378, 51)),
    (r"H[18]00", Peak(989, 494, 67)),
    (r"H20\b", Peak(148, 74, 44)),
    (r"A[18]00", Peak(312, 156, 19.5)),
    (r"A40\b", Peak(149.7, 74.8, 37.4)),
    (r"A30\b", Peak(165, 82, 10.3)),
    (r"A10\b", Peak(125, 62.5, 31.2)),
    (r"L40S", Peak(362, 183, 91.6)),
    (r"L40\b", Peak(181, 90.5, 90.5)),
    (r"L4\b", Peak(121, 60, 30.3)),
    (r"RTX 6000 Ada", Peak(364, 182, 91.1)),
    (r"RTX A6000", Peak(154.8, 77.4, 38.7)),
    (r"RTX 5090\b(?! Laptop| D)", Peak(209.5, 104.8, 104.8)),
    (r"RTX 4090\b(?! Laptop| D)", Peak(165.2, 82.6, 82.6)),
    (r"RTX 3090\b(?! Ti)", Peak(71, 35.6, 35.6)),
    (r"V100", Peak(15.7, 15.7, 15.7)),
    (r"T4\b", Peak(8.1, 8.1, 8.1)),
    (r"MI300X", Peak(1307, 654, 163)),
)

_MEASURED_FOR_S = 0.5
_SIZE = 2048  # of the square matrices measured on a CPU, large enough for full speed


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Return FLOP/s of one device at the precision of the matrix products; None for an unknown GPU.

    A CPU is measured once, with this process's threads, in half a second.
    """
    if device.type == "cuda":
        return gpu_peak(
            torch.cuda.get_device_name(device), precision, torch.get_float32_matmul_precision() != "highest"
        )
    if device.type == "cpu":
        return _measured(precision, torch.get_num_threads())
    return None


def gpu_peak(name: str, precision: Precision, tf32: bool = False) -> float | None:
    """Look up a GPU by the driver's name. tf32: fp32 matrix products may round their inputs to TF32."""
    for pattern, peak in _KNOWN:
        if re.search(pattern, name):
            tflops = peak.bf16 if precision == "bf16" else peak.tf32 if tf32 else peak.fp32
            return tflops * 1e12
    return None


@cache
def _measured(precision: Precision, num_threads: int) -> float:
    """Time matrix products for half a second and return the fastest; the threads only key the cache."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = (torch.full((_SIZE, _SIZE), 0.5, dtype=dtype) for _ in range(2))
    fastest_s = float("inf")
    ends_at = time.perf_counter() + _MEASURED_FOR_S
    while fastest_s == float("inf") or time.perf_counter() < ends_at:
        before = time.perf_counter()
        one @ other
        fastest_s = min(fastest_s, time.perf_counter() - before)
    return 2 * _SIZE**3 / fastest_s
