"""Mixed precision where the device computes in it: ``--bf16 auto``."""

from __future__ import annotations

from typing import Literal

import torch

#: ``auto``: bf16-mixed where the device has the instructions; ``none``: ``trainer.precision`` as it is.
Bf16 = Literal["none", "auto"]


def has_bf16(accelerator: str = "auto") -> bool:
    """Whether the device that a run would use multiplies matrices in bfloat16 by instructions of its own.

    A device without them emulates bfloat16, which is slower than float32.

    Args:
        accelerator: ``trainer.accelerator``. Anything but a CPU and a CUDA GPU has none as far as is known here.
    """
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if accelerator not in ("cpu", "auto"):
        return False
    # torch has no public question for it; of a version without this one a CPU is taken to have none
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
