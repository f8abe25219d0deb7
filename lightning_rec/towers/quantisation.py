"""Loading a language model in 8 or 4 bits, where bitsandbytes and a CUDA device are there."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Literal

import torch
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

    Raises:
        RuntimeError: this machine lacks what is needed.
    """
    if kind == "none":
        return {}
    missing = [
        what
        for what, there in (
            ("the package bitsandbytes (`pip install bitsandbytes`)", _installed()),
            ("a CUDA device that torch sees", torch.cuda.is_available()),
        )
        if not there
    ]
    if missing:
        raise RuntimeError(
            f"quantisation {kind!r} needs {' and '.join(missing)}, which this machine lacks: set quantisation to none, "
            "or run where both are."
        )
    config = BitsAndBytesConfig(load_in_8bit=True)
    if kind == "4bit":
        compute = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    return {"quantization_config": config, "device_map": {"": int(os.environ.get("LOCAL_RANK", "0"))}}
