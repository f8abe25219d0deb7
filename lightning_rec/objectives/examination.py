"""Position bias: the probability that a place on the page is looked at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Given probabilities below this are taken for this: a click where nobody looks has no likelihood.
LEAST = 1e-6


class Examination(nn.Module):
    """The probability θ that the candidate at a place on the page is looked at.

    A click needs both a look and an interest: ``P(click) = θ(place) · P(click | looked at)``, the position-based model
    (Richardson et al., "Predicting clicks", WWW 2007; Craswell et al., "An experimental comparison of click
    position-bias models", WSDM 2008). With θ known, a click counts ``1 / θ`` times (Joachims et al., "Unbiased
    learning-to-rank with biased feedback", WSDM 2017).

    Learned probabilities are relative to the first place, which is always looked at: only ratios can be told from
    clicks. They start at the discount of DCG, ``1 / log2(1 + place)``, or at the given ones, and never pass 1. Where
    the place of a candidate is unknown, θ is 1: it counts as it would without an examination. A probability that the
    data give for a candidate stands above the one of its place.

    Args:
        positions: number of places that have a probability of their own; those beyond share that of the last.
        propensities: probability of each place from the first on, in (0, 1], for instance measured by showing lists in
            random order. Places beyond the last given one share its probability.
        clip: highest weight ``1 / θ`` of a click, and of the weights by which the examination is learned.
        learn: learn the probabilities beside the click model; null learns them when none are given. false without
            ``propensities`` uses those that the data give for each candidate.

    Raises:
        ValueError: for a number, a probability or a clip out of range.
    """

    def __init__(
        self,
        positions: int = 50,
        propensities: list[float] | None = None,
        clip: float = 10.0,
        learn: bool | None = None,
    ) -> None:
        super().__init__()
        self.learn = propensities is None if learn is None else learn
        if positions < 1 or (self.learn and positions < 2):
            raise ValueError(
                f"positions is {positions}; it must be at least 1, and at least 2 to learn how places differ."
            )
        if not clip >= 1:
            raise ValueError(f"clip is {clip}; a weight is 1 at the least, so it must be at least 1.")
        if propensities is not None and (not propensities or not all(0 < value <= 1 for value in propensities)):
            raise ValueError(
                f"propensities are {propensities}; give one probability a place, each above 0 and at most 1."
            )
        self.positions = positions
        self.clip = clip
        self.given = propensities is not None
        places = torch.arange(1, positions + 1, dtype=torch.float64)
        if propensities is not None:
            values = torch.tensor(propensities[:positions], dtype=torch.float64)
            start = torch.cat([values, values[-1:].expand(max(0, positions - len(values)))])
        else:
            start = 1 / torch.log2(1 + places) if self.learn else torch.ones_like(places)
        if self.learn:
            # A place that starts at 1 could not move: the sigmoid is flat there.
            self.logits = nn.Parameter((start[1:] / start[0]).clamp(max=0.99).logit().float())
        else:
            self.register_buffer("fixed", start.float(), persistent=False)

    def log_terms(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Logs of the probabilities that candidates were looked at, and that they were not.

        Args:
            positions: places from 1, 0 unknown; any shape.

        Returns:
            ``log θ`` and ``log(1 - θ)`` of that shape; 0 and ``-inf`` where the place is unknown.
        """
        if self.learn:
            logits = self.logits.float() if self.logits.dtype in (torch.float16, torch.bfloat16) else self.logits
            seen, missed = F.logsigmoid(logits), F.logsigmoid(-logits)
            sure = logits.new_zeros(2)  # an unknown place, and the first one
        else:
            fixed = self.get_buffer("fixed")
            fixed = fixed.float() if fixed.dtype in (torch.float16, torch.bfloat16) else fixed
            seen, missed = fixed.log(), torch.log1p(-fixed)
            sure = fixed.new_zeros(1)
        at = positions.clamp(0, self.positions)
        return torch.cat([sure, seen])[at], torch.cat([sure - torch.inf, missed])[at]

    def probability(self, positions: Tensor) -> Tensor:
        """θ of places from 1, any shape; 1 where the place is unknown (0)."""
        return self.log_terms(positions)[0].exp()

    def forward(self, positions: Tensor) -> Tensor:
        """The same as :meth:`probability`."""
        return self.probability(positions)

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"positions={self.positions}, clip={self.clip}, learn={self.learn}"


@dataclass
class Examined:
    """How likely each candidate of a step was looked at.

    Attributes:
        log_seen: ``(b, c)`` log of the probability that it was.
        log_missed: ``(b, c)`` log of the probability that it was not, ``-inf`` for a sure look.
        clip: highest weight of a click.
    """

    log_seen: Tensor
    log_missed: Tensor
    clip: float

    @property
    def inverse(self) -> Tensor:
        """``(b, c)`` clipped inverse-propensity weights, through which nothing is learned."""
        return (-self.log_seen.detach()).clamp(max=math.log(self.clip)).exp()


def examined(
    examination: Examination | None, positions: Tensor | None, propensities: Tensor | None, scores: Tensor
) -> Examined | None:
    """The probabilities of a step: given ones, where there are any, before those of the place.

    Args:
        examination: None uses given probabilities alone, if there are any.
        positions: ``(b, c)`` places from 1, 0 unknown; None without.
        propensities: ``(b, c)`` given probabilities, NaN unknown; None without.
        scores: ``(b, c)``, for the type of the result.

    Returns:
        None when there is nothing to correct by.

    Raises:
        ValueError: when the examination needs places and the data have none.
    """
    if examination is None:
        if propensities is None:
            return None
        seen, missed, clip = torch.zeros_like(scores), torch.full_like(scores, -torch.inf), 10.0
    else:
        clip = examination.clip
        if positions is None and (examination.learn or propensities is None):
            raise ValueError(
                "The objective has an examination (position bias), and the data do not say at which place a candidate "
                "was shown. Map a column of positions in the data module, or set `examination: null`."
            )
        if propensities is None and not examination.learn and not examination.given:
            raise ValueError(
                "The examination has `learn: false` and no `propensities`, and the data give no propensity for a "
                "candidate. Give `propensities`, map such a column in the data module, or set `learn: true`."
            )
        places = torch.zeros_like(scores, dtype=torch.int64) if positions is None else positions
        seen, missed = (x.to(scores.dtype) for x in examination.log_terms(places))
    if propensities is not None:
        known = ~propensities.isnan()
        theta = propensities.to(scores.dtype).nan_to_num(1.0).clamp(LEAST, 1.0)
        seen = torch.where(known, theta.log(), seen)
        missed = torch.where(known, torch.log1p(-theta), missed)
    return Examined(seen, missed, clip)
