"""What a request, or an item, must be like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from numbers import Integral, Real
from typing import Any, get_args

from lightning_rec.recommend.rerank import check_fields
from lightning_rec.recommend.types import Explore, Request, RequestError


def checked_items(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The same items, each with an ``item_id`` of its own.

    Raises:
        RequestError: an item without an id, or two with the same.
    """
    seen: set[str] = set()
    for number, item in enumerate(rows):
        id_ = item.get("item_id")
        if not isinstance(id_, str) or not id_:
            raise RequestError(
                f"Item {number} has no item_id.", "no_item_id", "Every item needs a non-empty string item_id."
            )
        if id_ in seen:
            raise RequestError(f"The item {id_!r} comes twice.", "repeated_item", "Send every item once.")
        seen.add(id_)
    return rows


def check_request(request: Request, attributes: Mapping[str, Sequence[Any]]) -> None:
    """Refuses a request that cannot be answered.

    Args:
        request: the request.
        attributes: the fields that the items have.

    Raises:
        RequestError: naming the option and the remedy.
    """
    for name in ("history", "candidates", "exclude"):
        if isinstance(getattr(request, name), str | bytes):
            raise RequestError(
                f"{name} is {getattr(request, name)!r}, which is no list.", f"bad_{name}", "Give a list of item ids."
            )
    k: Any = request.k
    if not isinstance(k, Integral) or k < 1:
        raise RequestError(f"k is {k!r}.", "bad_k", "It is a whole number of at least one item.")
    if not 0 <= request.diversity <= 1:
        raise RequestError(f"diversity is {request.diversity}.", "bad_diversity", "It lies between 0 and 1.")
    if request.explore not in get_args(Explore):
        raise RequestError(
            f"There is no exploration {request.explore!r}.", "bad_explore", f"Choose of {', '.join(get_args(Explore))}."
        )
    strength: Any = request.exploration
    if not (isinstance(strength, Real) and 0 <= float(strength) < inf):
        raise RequestError(f"exploration is {strength!r}.", "bad_exploration", "It is a finite number of at least 0.")
    if request.half_life is not None and not request.half_life > 0:
        raise RequestError(f"half_life is {request.half_life}.", "bad_half_life", "It is more than 0 seconds.")
    if request.times is not None and len(request.times) != len(request.history or ()):
        raise RequestError(
            f"There are {len(request.times)} times for {len(request.history or ())} events of the history.",
            "bad_times",
            "Give one time for each event, or none.",
        )
    if request.half_life is not None and request.history is not None and request.times is None:
        raise RequestError("half_life needs the times of the history.", "no_times", "Give times, or leave it out.")
    for name, limit in request.at_most.items():
        if limit < 1:
            raise RequestError(f"at_most allows {limit} items of one {name}.", "bad_quota", "Allow at least one.")
    check_fields(request.where, attributes, "where")
    check_fields(request.at_most, attributes, "at_most")


def is_plain(request: Request) -> bool:
    """Whether the best scores are the answer: no filter, quota, diversity or exploration."""
    return (
        request.candidates is None
        and not request.where
        and not request.at_most
        and not request.diversity
        and request.explore == "none"
    )
