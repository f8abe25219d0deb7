"""Softmax cross-entropy over many candidates, without a stored positions × candidates matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_rec.objectives.base import (
    Objective,
    Repeats,
    excluded_columns,
    full_precision,
    no_positions,
    positions_per_chunk,
)


class Softmax(Objective):
    """The target should be the most likely of all candidates: cross-entropy of a softmax over dot products.

    Over the whole catalogue this is the full softmax; over sampled or in-batch candidates it is the sampled softmax,
    which is unbiased in the limit when each logit is lowered by the log of the expected number of times its candidate
    is drawn (Bengio and Senecal, 2008; Yi et al., "Sampling-bias-corrected neural modeling for large corpus item
    recommendations", RecSys 2019).

    The loss walks over chunks of positions and works out the gradients in the same pass, as the fused linear
    cross-entropy of Liger Kernel does (Hsu et al., 2024, arXiv:2410.10989): memory holds chunk × candidates, and
    nothing is computed twice. First derivatives only.

    Args:
        label_smoothing: share of the target's probability that is spread evenly over the valid candidates, the target
            among them. A candidate that is excluded for a position receives none of it.
        correct_sampling: lower each logit by ``log_q`` when the candidates were sampled.
        exclude_known: another known positive of the user never counts as a negative.
        chunk_size: number of positions scored at once; null chooses by device and number of candidates.

    Raises:
        ValueError: when ``label_smoothing`` is outside ``[0, 1)`` or ``chunk_size`` is below 1.
    """

    takes_repeats = True

    def __init__(
        self,
        label_smoothing: float = 0.0,
        correct_sampling: bool = True,
        exclude_known: bool = True,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1.")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1, or null to choose by device.")
        self.label_smoothing = label_smoothing
        self.correct_sampling = correct_sampling
        self.exclude_known = exclude_known
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
        repeats: Repeats | None = None,
    ) -> Tensor:
        """See :meth:`Objective.forward`; ``rating`` is not used.

        ``repeats`` adds its value to the logits of candidates in the history, the target too where it is one of them.
        """
        if target.numel() == 0:
            nothing = no_positions(interest, candidates)
            return nothing if repeats is None else nothing + 0 * repeats.value
        with torch.autocast(interest.device.type, enabled=False):
            interest, candidates = full_precision(interest, candidates)
            return _ChunkedSoftmax.apply(
                interest,
                candidates,
                target,
                owner,
                known if self.exclude_known else None,
                log_q if self.correct_sampling else None,
                self.label_smoothing,
                positions_per_chunk(candidates.shape[0], self.chunk_size, interest.device),
                torch.is_grad_enabled(),
                None if repeats is None else repeats.columns,
                None if repeats is None else repeats.value.to(interest.dtype),
            )

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return (
            f"label_smoothing={self.label_smoothing}, correct_sampling={self.correct_sampling}, "
            f"exclude_known={self.exclude_known}, chunk_size={self.chunk_size}"
        )


class _ChunkedSoftmax(torch.autograd.Function):
    """The loss and, where asked for, both gradients in one walk over chunks of positions."""

    @staticmethod
    def forward(
        ctx: Any,
        interest: Tensor,
        candidates: Tensor,
        target: Tensor,
        owner: Tensor | None,
        known: Tensor | None,
        log_q: Tensor | None,
        smoothing: float,
        chunk: int,
        with_grad: bool,
        touched: Tensor | None,
        repeat: Tensor | None,
    ) -> Tensor:
        # Inside a Function gradients are always off, so the caller says whether they were on.
        need_interest = with_grad and ctx.needs_input_grad[0]
        need_candidates = with_grad and ctx.needs_input_grad[1]
        n = target.shape[0]
        grad_interest = torch.empty_like(interest) if need_interest else None
        grad_candidates = torch.zeros_like(candidates) if need_candidates else None
        grad_repeat = interest.new_zeros(()) if repeat is not None and with_grad else None
        total = interest.new_zeros(())
        block = interest.new_empty(min(chunk, n), candidates.shape[0])
        by_column = candidates.t()
        log_q = None if log_q is None else log_q.to(interest.dtype)
        small = _all_small(interest, candidates, log_q, repeat)
        for start in range(0, n, chunk):
            stop = min(start + chunk, n)
            rows = interest[start:stop]
            column = target[start:stop, None]
            logits = torch.mm(rows, by_column, out=block[: stop - start])
            if log_q is not None:
                logits.sub_(log_q)
            again = None if touched is None or repeat is None else _Again(touched[start:stop], column)
            if again is not None and repeat is not None:
                again.add(logits, repeat)
            excluded = excluded_columns(target[start:stop], None if owner is None else owner[start:stop], known)
            picked = logits.gather(1, column)
            if excluded is not None:
                logits.scatter_(1, excluded, -torch.inf).scatter_(1, column, picked)
            smoothed = _Smoothing(logits, smoothing) if smoothing else None
            highest = None if small else logits.amax(1, keepdim=True)
            weights = (logits if highest is None else logits.sub_(highest)).exp_()
            mass = weights.sum(1, keepdim=True)
            log_mass = mass.log() if highest is None else mass.log() + highest
            loss = log_mass - picked
            if smoothed is not None:
                loss = (1 - smoothing) * loss + smoothing * (log_mass - smoothed.mean)
            total += loss.sum()
            if not (need_interest or need_candidates or grad_repeat is not None):
                continue
            # d loss / d logits = softmax - wanted. It stays unnormalised (times `mass`) here, because dividing the
            # (chunk, d) operands of the two products is cheaper than another pass over the (chunk, c) block.
            if smoothed is not None:
                smoothed.subtract_from(weights, mass)
            weights.scatter_add_(1, column, (smoothing - 1) * mass)
            scale = (mass * n).reciprocal_()
            if again is not None and grad_repeat is not None:
                grad_repeat += (again.gather(weights) * scale).sum()
            if grad_interest is not None:
                torch.mm(weights, candidates, out=grad_interest[start:stop]).mul_(scale)
            if grad_candidates is not None:
                grad_candidates.addmm_(weights.t(), rows * scale)
        ctx.gradients = (grad_interest, grad_candidates, grad_repeat)
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = tuple(None if g is None else g * grad for g in ctx.gradients)
        return (*grads[:2], None, None, None, None, None, None, None, None, grads[2])


def _all_small(interest: Tensor, candidates: Tensor, log_q: Tensor | None, repeat: Tensor | None) -> bool:
    """True when no score can be so large or so low that its exponential leaves the range of float32.

    Then the pass that finds the highest score of each position, and takes it off, is spared: 7 % of the time on a CPU.
    A GPU would have to wait for the answer, so it is not asked.
    """
    if interest.device.type != "cpu":
        return False
    bound = interest.norm(dim=1).max() * candidates.norm(dim=1).max()
    if log_q is not None:
        bound = bound + log_q.abs().max()
    if repeat is not None:
        bound = bound + repeat.abs()
    return bool(bound <= 40)  # exp(40) is 2e17; False for NaN


class _Again:
    """The candidates of a chunk that are in the history of their position, each once.

    Args:
        touched: ``(p, s)`` columns padded with -1, some perhaps twice.
        target: ``(p, 1)`` column of each target, which stands in for padding.
    """

    def __init__(self, touched: Tensor, target: Tensor) -> None:
        columns = touched.sort(dim=1, descending=True).values  # equal ones side by side, padding last
        self.real = columns >= 0
        self.real[:, 1:] &= columns[:, 1:] != columns[:, :-1]
        holds_target = (columns == target).any(1, keepdim=True)
        # What is no column of its own writes what the target's column gets anyway.
        self.columns = torch.where(columns < 0, target, columns)
        self.added = (columns >= 0) | holds_target

    def add(self, logits: Tensor, value: Tensor) -> None:
        """Adds ``value`` to the columns, in place; writing twice what was read before is writing once."""
        before = logits.gather(1, self.columns)
        logits.scatter_(1, self.columns, torch.where(self.added, before + value, before))

    def gather(self, block: Tensor) -> Tensor:
        """``(p, s)`` the columns' values, 0 where there is none or where it is the same column again."""
        return block.gather(1, self.columns).masked_fill(~self.real, 0)


class _Smoothing:
    """The share of the wanted distribution that is spread evenly over the valid candidates of each position."""

    def __init__(self, logits: Tensor, smoothing: float) -> None:
        self.smoothing = smoothing
        self.excluded = logits == -torch.inf
        self.n_valid = (~self.excluded).sum(1, keepdim=True)
        self.mean = logits.masked_fill(self.excluded, 0).sum(1, keepdim=True) / self.n_valid

    def subtract_from(self, weights: Tensor, mass: Tensor) -> None:
        weights.sub_(mass * self.smoothing / self.n_valid).masked_fill_(self.excluded, 0)
