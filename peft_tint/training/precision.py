"""Which precision to train in: bfloat16 where the device computes it natively."""

import os
import platform
import warnings
from functools import lru_cache

import torch
from accelerate import Accelerator, PartialState
from torch import nn

from .arguments import TintTrainingArguments

# What `ONEDNN_MAX_CPU_ISA` may limit oneDNN to that has no bfloat16 arithmetic
ISA_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")

# Parameters of a model below which bfloat16 rounds for nothing: its products are too small to be faster
SMALL = 10**6


def bf16_is_native(device: str | torch.device | None = None) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware. Others emulate it, slower than float32.

    CUDA and XPU answer for themselves. A CPU does by AMX or AVX-512-BF16, on Arm by its BF16 instructions, as far as
    the variables `ATEN_CPU_CAPABILITY` and `ONEDNN_MAX_CPU_ISA` let PyTorch use them. With `device=None` the answer is
    for the device that Accelerate uses.
    """
    device = PartialState().device if device is None else torch.device(device)
    if device.type in ("cuda", "xpu"):
        backend = torch.get_device_module(device)
        with backend.device(device):
            return backend.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _cpu_has_bf16()


def _cpu_has_bf16():
    # PyTorch's products of bfloat16 matrices are oneDNN's
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    is_allowed = torch.backends.cpu.get_cpu_capability() == "AVX512" and limit.upper() not in ISA_WITHOUT_BF16
    return has_bf16 and is_allowed


def choose_autocast(args: TintTrainingArguments, accelerator: Accelerator, model: nn.Module) -> torch.dtype | None:
    """The dtype that a training autocasts to, None for none.

    Raises ValueError for `fp16` on a CPU, and for a precision of Accelerate's configuration that there is no autocast
    for."""
    device, dtype = accelerator.device, None
    if args.fp16:
        if device.type == "cpu":
            raise ValueError("`fp16` is set and the device is a CPU; leave it out, or set `bf16`.")
        return torch.float16
    if args.bf16:
        dtype = torch.bfloat16
    elif args.bf16 is None:
        configured = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
        if accelerator.mixed_precision not in configured:
            raise ValueError(
                f"Accelerate is configured for {accelerator.mixed_precision!r}; it must be one of "
                f"{', '.join(configured)}, or set `bf16` or `fp16`."
            )
        dtype = configured[accelerator.mixed_precision]
        is_small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
        if dtype is None and not is_small and bf16_is_native(device) and torch.float32 in weight_dtypes(model):
            dtype = torch.bfloat16
    if dtype is torch.bfloat16 and not bf16_is_native(device):
        _warn_of_emulation(device.type)
    return dtype


def weight_dtypes(model: nn.Module) -> set[torch.dtype]:
    """What a TINT model's weights are stored in. Its coefficients are always float32."""
    return {p.dtype for name, p in model.named_parameters() if "tint_coefficients" not in name}


def describe_precision(autocast: torch.dtype | None, model: nn.Module) -> str:
    """Such as "bfloat16 autocast"; without autocast what the weights are stored in, "float32"."""
    dtypes = weight_dtypes(model) if autocast is None else {autocast}
    names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return ", ".join(names) + (" autocast" if autocast else "")


@lru_cache
def _warn_of_emulation(device_type):
    """Once for each kind of device."""
    warnings.warn(
        f"bfloat16 is set, and this {device_type} device has no instructions for it. PyTorch emulates it: a linear "
        "layer takes 2 to 16 times as long as in float32. Leave `bf16` out, and the trainer takes float32 here.",
        stacklevel=4,
    )
