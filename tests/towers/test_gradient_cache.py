"""Recomputing whole passes changes no gradient, and keeps next to nothing between forward and backward."""

from __future__ import annotations

import peft
import pytest
import torch

from lightning_rec.towers import TextEncoder

TEXTS = ["red shoe", "blue boot the old river song", "film", "space war love news city", "dog cat", "", "big small new"]


def _gradients(model: str, recompute: bool | str, tuned: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and bytes that autograd kept, of one step over passes of at most eight tokens."""
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear") if tuned == "lora" else None
    encoder = TextEncoder(
        model, tune="full" if lora is None else None, peft=lora, gradient_checkpointing=recompute, token_budget=8
    )
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2  # the random numbers of the second pass must be those of the first
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    encoder.train()
    table = encoder.tokenise(TEXTS)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        vectors = encoder.encode_table(table, torch.arange(len(TEXTS)))
        loss = torch.log_softmax(vectors @ vectors.t(), 1).diagonal().mean()
    size = sum(size for pointer, size in kept.items() if pointer not in parameters)
    loss.backward()
    grads = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    return loss.detach(), grads, size


@pytest.mark.parametrize("tuned", ["full", "lora"])
def test_the_gradient_of_the_plain_step(tiny_model: str, tuned: str) -> None:
    loss, grads, kept = _gradients(tiny_model, False, tuned)
    again, wanted, less = _gradients(tiny_model, "passes", tuned)
    torch.testing.assert_close(again, loss)
    assert grads.keys() == wanted.keys()
    assert any(gradient.abs().max() > 0 for gradient in grads.values())
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)
    assert less < kept / 4, f"{less} of {kept} bytes"
