"""Loading a language model from its folder."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModel, AutoModelForTextEncoding
from transformers.utils import logging as transformers_logging

from lightning_rec.towers.quantisation import Quantisation, keep_differentiable, quantisation_options

#: Held while transformers builds a model: it swaps methods of its classes meanwhile, and of two threads that do so at
#: once one may leave the other's in place for good, after which tied weights are no longer tied in this process.
LOADING = threading.RLock()


@torch.inference_mode(False)
def load_language_model(
    folder: Path, config: Any, dtype: str = "float32", quantisation: Quantisation = "none", tune: str = "frozen"
) -> nn.Module:
    """A transformers model without a pooler, or the encoder of one that has a decoder too.

    Args:
        folder: where it lies, as safetensors.
        config: its config.
        dtype: precision of the weights.
        quantisation: ``none``, ``8bit`` or ``4bit``.
        tune: ``frozen``, ``adapter`` or ``full``; only in the last case its parameters want gradients.

    Returns:
        The model, in training mode unless it is frozen.
    """
    with LOADING:
        progress = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            model = _kind(config).from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                **quantisation_options(quantisation),
            )
        finally:
            if progress:
                transformers_logging.enable_progress_bar()
    model = _read_part(model)
    model.config.use_cache = False
    if quantisation == "4bit":
        keep_differentiable(model, tune == "adapter")
    if quantisation != "none" and tune == "adapter":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if tune != "full":
        model.requires_grad_(False)
    return model.train(tune != "frozen")


def count_parameters(config: Any) -> int:
    """How many parameters a language model has, told by its config: no weight is read."""
    with LOADING, torch.device("meta"):
        return sum(parameter.numel() for parameter in _read_part(_kind(config).from_config(config)).parameters())


def _kind(config: Any) -> Any:
    # a folder that holds T5's encoder alone would be given a decoder of random weights
    halved = "t5" in config.model_type and not config.is_encoder_decoder
    return AutoModelForTextEncoding if halved else AutoModel


def _read_part(model: Any) -> Any:
    """The part of a model that reads texts."""
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    if getattr(model, "pooler", None) is not None:
        # It reads the first token for another task: unused, it would be parameters without a gradient.
        model.pooler = None
    return model


def checkpoint_gradients(model: Any, inputs: bool) -> None:
    """Makes a model recompute its layers in the backward pass.

    Args:
        model: a transformers model, before an adapter is put on.
        inputs: let its embeddings want gradients, which an adapter above frozen ones needs.
    """
    # The re-entrant kind gives no gradient to adapters below a frozen embedding.
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer releases of transformers
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if inputs:
        model.enable_input_require_grads()
