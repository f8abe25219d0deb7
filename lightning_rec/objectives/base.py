"""The contract of an objective, and what the objectives share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Repeats(NamedTuple):
    """What is added to the score of candidates that are in the history of a position.

    Attributes:
        columns: ``(p, s)`` int64, columns of candidates in the history up to each position, padded with -1; a column
            may stand there twice and counts once.
        value: scalar that is added.
    """

    columns: Tensor
    value: Tensor


class Objective(nn.Module, ABC):
    """Turns interest vectors and candidate vectors into a loss.

    Scores are plain dot products, ``interest @ candidates.T``: a cosine score or a temperature is folded into the
    vectors before they come here. An objective computes in float32 whatever the precision of the run
    (:func:`full_precision`), and never stores a positions × candidates matrix.

    An objective of your own::

        import torch
        from lightning_rec.objectives import Objective

        class SquaredHinge(Objective):
            '''The target should beat the mean candidate by a margin.'''

            def __init__(self, margin: float = 1.0) -> None:
                super().__init__()
                self.margin = margin

            def forward(self, interest, candidates, target, *, owner=None, known=None, log_q=None, rating=None):
                gap = (interest * (candidates[target] - candidates.mean(0))).sum(-1)
                return (self.margin - gap).clamp(min=0).square().mean()

    Name it in YAML::

        model:
          objective:
            class_path: my_objectives.SquaredHinge
            init_args: {margin: 0.5}
    """

    #: True when positions without a rating teach nothing, so that a data set without ratings is an error.
    needs_rating: bool = False
    #: True when ``forward`` also takes ``repeats=``, a :class:`Repeats`: what a repeat adds to the score is learned.
    takes_repeats: bool = False

    def configure(
        self,
        n_items: int | None = None,
        rating_range: tuple[float, float] | None = None,
        rating_mean: float | None = None,
        dim: int | None = None,
    ) -> None:
        """Called once, when the data are known, before weights are loaded. Nothing to do by default.

        Args:
            n_items: number of items in the catalogue, padding not counted.
            rating_range: lowest and highest rating of the data, or None when the data have no ratings.
            rating_mean: mean of the training ratings, or None without data or ratings.
            dim: width of the vectors of both towers.
        """

    def predict(self, dot: Tensor) -> Tensor:
        """The rating that a dot product stands for; an objective that ``needs_rating`` overrides it."""
        return dot

    def predict_pairs(self, interest: Tensor, items: Tensor) -> Tensor:
        """The ratings of pairs; an objective whose ratings are no function of the dot product overrides it.

        Args:
            interest: ``(p, d)`` interest vectors.
            items: ``(p, d)`` item vectors.

        Returns:
            ``(p,)`` ratings.
        """
        return self.predict((interest * items).sum(-1))

    @abstractmethod
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
        """The mean loss of ``p`` supervised positions against ``c`` distinct candidates.

        Args:
            interest: ``(p, d)`` interest vectors; ``p`` may be 0.
            candidates: ``(c, d)`` item vectors.
            target: ``(p,)`` int64, the column in ``[0, c)`` of the item that followed each position.
            owner: ``(p,)`` int64, the row of ``known`` that belongs to the user of each position. Needed when
                ``known`` is given.
            known: ``(b, k)`` int64, columns of the candidates that each user is known to like, padded with -1.
            log_q: ``(c,)`` log of the expected number of times each candidate is drawn for a step, or None when the
                candidates are the whole catalogue.
            rating: ``(p,)`` rating of each target, NaN where there is none, or None without ratings.

        Returns:
            A scalar: the mean over positions, or 0 (still attached to the graph) when there are none.
        """


def full_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32 at least: half precision is widened, float64 is kept."""
    return tuple(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in tensors)


def no_positions(interest: Tensor, candidates: Tensor) -> Tensor:
    """The loss of no positions: 0 with a graph, so that every parameter still gets its (zero) gradient."""
    interest, candidates = full_precision(interest, candidates)
    # A NaN or an infinity times 0 is NaN, and must not become the loss of nothing.
    return sum(((x * 0).nan_to_num(0.0, 0.0, 0.0).sum() for x in (interest, candidates)), start=interest.new_zeros(()))


def excluded_columns(target: Tensor, owner: Tensor | None, known: Tensor | None) -> Tensor | None:
    """The columns that may not serve as negatives of each position, besides the target itself.

    Padding is replaced by the position's own target, so that the result can be scattered without a mask by a caller
    that puts the target's value back afterwards.

    Args:
        target: ``(p,)`` column of the target.
        owner: ``(p,)`` row of ``known`` of each position.
        known: ``(b, k)`` columns padded with -1.

    Returns:
        ``(p, k)`` columns, or None when ``known`` is None or empty.

    Raises:
        ValueError: when ``known`` comes without ``owner``.
    """
    if known is None or known.shape[1] == 0:
        return None
    if owner is None:
        raise ValueError(
            "The objective was given `known` without `owner`, so it cannot tell which user's known positives belong to "
            "a position. Pass `owner`, the row of `known` for every position."
        )
    columns = known.index_select(0, owner)
    return torch.where(columns < 0, target[:, None], columns)


def positions_per_chunk(n_candidates: int, chunk_size: int | None, device: torch.device) -> int:
    """How many positions to score at once, so that a chunk × candidates block stays small.

    Args:
        n_candidates: ``c``.
        chunk_size: what the user asked for, or None to choose by device.
        device: a CPU is fastest with blocks of about a thousand positions at 1,700 to 4,400 candidates (matrix products
            gain more from long operands than passes over the block lose by leaving the cache); a GPU needs larger ones
            to keep its processors busy.
    """
    if chunk_size is not None:
        return max(1, chunk_size)
    elements = 2**21 if device.type == "cpu" else 2**25
    return max(32, elements // max(1, n_candidates))
