"""Objectives that look at one candidate at a time: BPR, and binary cross-entropy with its calibration."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_rec.objectives.base import (
    Objective,
    excluded_columns,
    full_precision,
    no_positions,
    positions_per_chunk,
)


class _Negatives(Objective):
    """What BPR and BCE share: every candidate but the target and the user's known positives is a negative.

    Positions are scored in chunks that are computed again in the backward pass, so that memory holds
    chunk × candidates.
    """

    def __init__(self, chunk_size: int | None = None) -> None:
        super().__init__()
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1, or null to choose by device.")
        self.chunk_size = chunk_size

    def forward(
        self,
        interest: Tensor,
        candidates: Tensor,
        target: Tensor,
        *,
        owner: Tensor | None = None,
        known: Tensor | None = None,
        log_q: Tensor | None = None,
        rating: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Objective.forward`; ``log_q`` and ``rating`` are not used."""
        n = target.shape[0]
        if n == 0:
            return no_positions(interest, candidates)
        with torch.autocast(interest.device.type, enabled=False):
            interest, candidates = full_precision(interest, candidates)
            step = positions_per_chunk(candidates.shape[0], self.chunk_size, interest.device)
            total = interest.new_zeros(())
            for start in range(0, n, step):
                part = slice(start, start + step)
                rows, columns = interest[part], target[part]
                owners = None if owner is None else owner[part]
                if torch.is_grad_enabled() and n > step:
                    # Nothing here is random, so the random state need not be kept.
                    value = checkpoint(
                        self._chunk, rows, candidates, columns, owners, known,
                        use_reentrant=False, preserve_rng_state=False,
                    )  # fmt: skip
                else:
                    value = self._chunk(rows, candidates, columns, owners, known)
                total = total + value
            return total / n

    def _chunk(
        self, interest: Tensor, candidates: Tensor, target: Tensor, owner: Tensor | None, known: Tensor | None
    ) -> Tensor:
        logits = interest @ candidates.t()
        column = target[:, None]
        negative = torch.ones_like(logits, dtype=torch.bool)
        excluded = excluded_columns(target, owner, known)
        if excluded is not None:
            negative.scatter_(1, excluded, False)
        negative.scatter_(1, column, False)
        return self.score(logits.gather(1, column), logits, negative).sum()

    @abstractmethod
    def score(self, positive: Tensor, logits: Tensor, negative: Tensor) -> Tensor:
        """The loss of each position.

        Args:
            positive: ``(p, 1)`` score of the target.
            logits: ``(p, c)`` scores of all candidates.
            negative: ``(p, c)`` True where a candidate is a negative of the position.

        Returns:
            ``(p,)``.
        """

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"chunk_size={self.chunk_size}"


class BPR(_Negatives):
    """The target should score above each negative: the mean over negatives of ``-log sigmoid(positive - negative)``
    (Rendle et al., "BPR: Bayesian personalized ranking from implicit feedback", UAI 2009).

    A position without any negative has a loss of 0.

    Args:
        chunk_size: number of positions scored at once; null chooses by device and number of candidates.
    """

    def score(self, positive: Tensor, logits: Tensor, negative: Tensor) -> Tensor:
        """See the class."""
        losses = F.softplus(logits - positive).masked_fill(~negative, 0)
        return losses.sum(1) / negative.sum(1).clamp(min=1)


class BCE(_Negatives):
    """The target is a yes and each negative a no: the mean, over the target and the negatives, of
    ``-log sigmoid(positive)`` and ``-log(1 - sigmoid(negative))``.

    With ``gbce_t`` above 0 it is the generalised BCE of gSASRec (Petrov and Macdonald, "gSASRec: reducing
    overconfidence in sequential recommendation trained with negative sampling", RecSys 2023): the probability of the
    target is raised to the power ``beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)``, where ``alpha`` is the share of
    the catalogue's other items that serve as negatives. ``t = 1`` undoes the overconfidence that sampling causes;
    ``t = 0`` leaves BCE as it is.

    Args:
        gbce_t: calibration ``t`` between 0 (plain BCE) and 1 (fully calibrated).
        chunk_size: number of positions scored at once; null chooses by device and number of candidates.

    Raises:
        ValueError: when ``gbce_t`` is outside ``[0, 1]``.
    """

    def __init__(self, gbce_t: float = 0.0, chunk_size: int | None = None) -> None:
        super().__init__(chunk_size)
        if not 0 <= gbce_t <= 1:
            raise ValueError(f"gbce_t is {gbce_t}; it must lie between 0 (plain BCE) and 1 (fully calibrated).")
        self.gbce_t = gbce_t
        self.n_items: int | None = None

    def configure(
        self,
        n_items: int | None = None,
        rating_range: tuple[float, float] | None = None,
        rating_mean: float | None = None,
        dim: int | None = None,
    ) -> None:
        """Keeps the number of items, from which the sampling rate follows."""
        self.n_items = n_items if n_items is not None else self.n_items

    def score(self, positive: Tensor, logits: Tensor, negative: Tensor) -> Tensor:
        """See the class."""
        n_negatives = negative.sum(1)
        losses = F.softplus(logits).masked_fill(~negative, 0).sum(1)
        return (losses + self._beta(n_negatives) * F.softplus(-positive[:, 0])) / (1 + n_negatives)

    def _beta(self, n_negatives: Tensor) -> Tensor | float:
        if self.gbce_t == 0:
            return 1.0
        if self.n_items is None:
            raise ValueError(
                "gBCE needs the number of items in the catalogue for its sampling rate. Call "
                "`configure(n_items=...)` before the first step, or set `gbce_t: 0` for plain BCE."
            )
        alpha = (n_negatives / max(1, self.n_items - 1)).clamp(max=1.0)
        # alpha * (t * (1 - 1 / alpha) + 1 / alpha), multiplied out so that alpha = 0 is no division by 0.
        return 1 - self.gbce_t * (1 - alpha)

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"gbce_t={self.gbce_t}, {super().extra_repr()}"
