"""Peak arithmetic of devices, and the share of it that a run uses."""

import re
from typing import NamedTuple


class _Peak(NamedTuple):
    """TFLOP/s of one device."""

    pattern: str
    """Regular expression that the device's name must contain."""
    half: float
    """fp16 on tensor cores with fp32 accumulation, dense: data sheets often print twice that, for 2:4 sparsity."""
    single: float
    """fp32 outside tensor cores: TF32 keeps 10 bits of the mantissa and is not what precision fp32 means here."""
    has_bf16: bool = True


# The first match counts, so a special form stands before the general one.  From the vendors' data sheets, named at the
# end of each line; bf16 runs at the speed of fp16 where there is any.
_PEAKS = (
    _Peak(r"\bB200\b", 2250.0, 75.0),  # NVIDIA DGX B200 data sheet, per GPU
    _Peak(r"\bH200 NVL\b", 835.5, 60.0),  # NVIDIA H200 data sheet
    _Peak(r"\bG?H200\b", 989.4, 66.9),  # NVIDIA H200 and GH200 data sheets
    _Peak(r"\bH100 PCIe\b", 756.0, 51.2),  # NVIDIA H100 data sheet
    _Peak(r"\bH100 NVL\b", 835.5, 60.0),  # NVIDIA H100 NVL data sheet
    _Peak(r"\bH100\b", 989.4, 66.9),  # NVIDIA H100 data sheet, SXM5
    _Peak(r"\bA100\b", 312.0, 19.5),  # NVIDIA A100 data sheet, SXM4 and PCIe
    _Peak(r"\bA40\b", 149.7, 37.4),  # NVIDIA A40 data sheet
    _Peak(r"\bA10\b", 125.0, 31.2),  # NVIDIA A10 data sheet
    _Peak(r"\bL40S\b", 362.05, 91.6),  # NVIDIA L40S data sheet
    _Peak(r"\bL40\b", 181.05, 90.5),  # NVIDIA L40 data sheet
    _Peak(r"\bL4\b", 121.0, 30.3),  # NVIDIA L4 data sheet
    _Peak(r"\bV100.*\bPCIE\b", 112.0, 14.0, has_bf16=False),  # NVIDIA V100 data sheet
    _Peak(r"\bV100\b", 125.0, 15.7, has_bf16=False),  # NVIDIA V100 data sheet, SXM2
    _Peak(r"\bT4\b", 65.0, 8.1, has_bf16=False),  # NVIDIA T4 data sheet
    _Peak(r"\bRTX 4090\b(?! D)", 165.2, 82.6),  # NVIDIA Ada architecture white paper
    _Peak(r"\bRTX 3090(?! Ti)\b", 71.0, 35.6),  # NVIDIA GA102 architecture white paper
    _Peak(r"\bMI300X\b", 1307.4, 163.4),  # AMD Instinct MI300X data sheet
)

# A slice of a device, or a slower form of it under the same number.
_PARTIAL = re.compile(r"\bMIG\b|\bLaptop\b|\bMax-Q\b")


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of one device at "fp32", "bf16" or "fp16", dense; None for a CPU or a device not listed.

    `device_name` is as `torch.cuda.get_device_name` gives it.
    """
    if _PARTIAL.search(device_name):
        return None
    peak = next((p for p in _PEAKS if re.search(p.pattern, device_name, re.IGNORECASE)), None)
    if peak is None or (precision == "bf16" and not peak.has_bf16):
        return None
    return 1e12 * (peak.single if precision == "fp32" else peak.half)


def utilisation(flops_per_second: float, device_name: str, precision: str, devices: int) -> float | None:
    """Model FLOPs utilisation: FLOP/s of the model, all devices together, over their peak; None where it is not known.

    As defined in PaLM (arXiv 2204.02311, appendix B): what recomputation repeats is not counted.
    """
    peak = peak_flops(device_name, precision)
    return None if peak is None else flops_per_second / (peak * devices)
