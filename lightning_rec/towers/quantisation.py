"""Loading a language model in 8 or 4 bits by bitsandbytes, on a CUDA device or a CPU."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

Quantisation = Literal["none", "8bit", "4bit"]


def _installed() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def quantisation_options(kind: Quantisation) -> dict[str, Any]:
    """What ``from_pretrained`` is given.

    4 bits are NF4 with quantised constants (QLoRA: Dettmers et al., NeurIPS 2023), 8 bits LLM.int8 (Dettmers et al.,
    NeurIPS 2022).

    Args:
        kind: ``none``, ``8bit`` or ``4bit``.

    On a CPU it saves memory and costs time: weights are brought to the precision of the computation in each pass.

    Raises:
        RuntimeError: bitsandbytes is not installed, or would end the process on this processor.
    """
    if kind == "none":
        return {}
    if not _installed():
        raise RuntimeError(
            f"quantisation {kind!r} needs bitsandbytes, which is not installed: run "
            "`pip install 'lightning-rec[quantise]'`, or set quantisation to none."
        )
    # it says in every layer of every pass that it rounds its inputs to float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    gpu = torch.cuda.is_available()
    if kind == "4bit" and not gpu and not four_bits_on_cpu():
        raise RuntimeError(
            "quantisation '4bit' needs a CUDA device, or a processor with AVX-512, without which bitsandbytes ends the "
            "process by an illegal instruction: set quantisation to 8bit or none."
        )
    config = BitsAndBytesConfig(load_in_8bit=True)
    if kind == "4bit":
        compute = torch.float32
        if gpu:
            compute = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    return {
        "quantization_config": config,
        "device_map": {"": int(os.environ.get("LOCAL_RANK", "0")) if gpu else "cpu"},
    }


def four_bits_on_cpu() -> bool:
    """Whether bitsandbytes' 4-bit kernels run on this processor: on x86 they are compiled for AVX-512 throughout."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not on_x86 or torch.backends.cpu.get_cpu_capability() == "AVX512"


def keep_differentiable(model: nn.Module, tuned: bool) -> None:
    """Keeps bitsandbytes from laying out 4-bit weights for inference where that layout would fail.

    On processors with bfloat16 instructions it does so at the first pass in evaluation mode, in blocks of 32 × 64; no
    gradient goes through what it computes from then on, in training mode either.

    Args:
        model: a model that was loaded in 4 bits.
        tuned: an adapter is trained on it.
    """
    module: Any  # bitsandbytes' linear layers, whose package is not always there
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and (
            tuned or module.out_features % 32 or module.in_features % 64
        ):
            module.support_avx512bf16_for_cpu = False
