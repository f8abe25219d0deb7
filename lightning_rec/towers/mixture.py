"""A mixture of experts between the language model and the item vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST_NOISE = 0.01


class MixtureOfExperts(nn.Module):
    """Several linear maps, mixed by a gate that reads the same vector: an adaptor that suits several domains.

    The mixture-of-experts adaptor of UniSRec (Hou et al., "Towards Universal Sequence Representation Learning for
    Recommender Systems", KDD 2022). Each expert subtracts a learned shift and multiplies by a matrix (a learned
    whitening); the weights of the experts are a softmax of ``x W_g``. In training the gate's logits get normal noise of
    the learned deviation ``softplus(x W_n) + 0.01``, so that no expert starves (noisy gating: Shazeer et al.,
    "Outrageously Large Neural Networks", ICLR 2017). In evaluation there is no noise.

    Args:
        width: width of the vectors that come in.
        dim: width of those that go out.
        experts: number of experts.
        init_std: standard deviation of the outputs before training, about, for inputs of deviation 1; None: matrices
            of deviation 0.02, as in UniSRec.
        noisy: add noise to the gate in training.

    Raises:
        ValueError: when there is no expert.
    """

    def __init__(
        self, width: int, dim: int, experts: int = 8, init_std: float | None = None, noisy: bool = True
    ) -> None:
        super().__init__()
        if experts < 1:
            raise ValueError(f"experts is {experts}; a mixture of experts needs at least 1.")
        self.experts, self.dim, self.noisy = experts, dim, noisy
        # The mean of the experts, which is what an untrained gate gives, is less spread than one of them.
        std = 0.02 if init_std is None else init_std * (experts / width) ** 0.5
        self.shift = nn.Parameter(torch.zeros(experts, width))
        self.weight = nn.Parameter(torch.randn(experts, dim, width) * std)
        self.gate = nn.Parameter(torch.zeros(width, experts))
        self.noise = nn.Parameter(torch.zeros(width, experts))

    def gates(self, x: Tensor) -> Tensor:
        """``(n, experts)`` weights of the experts, which sum to 1."""
        logits = x @ self.gate
        if self.noisy and self.training:
            logits = logits + torch.randn_like(logits) * (F.softplus(x @ self.noise) + _LEAST_NOISE)
        return logits.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, width)`` vectors to ``(n, dim)``."""
        # W (x - b) of all experts in one product: the shift is taken off behind it.
        taken = (self.weight @ self.shift[:, :, None]).squeeze(-1)
        out = F.linear(x, self.weight.flatten(0, 1)).unflatten(-1, (self.experts, self.dim)) - taken
        return (self.gates(x).unsqueeze(-2) @ out).squeeze(-2)

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"width={self.weight.shape[2]}, dim={self.dim}, experts={self.experts}, noisy={self.noisy}"
