"""Uniform draws from the articles that are alive at a moment."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray


def sample_alive(
    seconds: NDArray[np.int64],
    items: NDArray[np.int64],
    users: NDArray[np.int64],
    clicks: NDArray[np.int64],
    n: int,
    alive_seconds: int,
    seed: int,
) -> list[list[int]]:
    """Draws articles beside each click, without replacement and each with the same chance.

    An article is alive at time ``t`` when anybody read it in ``[t - alive_seconds, t]``. What the user reads anywhere
    in the log is not drawn.

    Args:
        seconds: ``(r,)`` times of all reads.
        items: ``(r,)`` their articles.
        users: ``(r,)`` their users.
        clicks: ``(c,)`` the reads to draw for, in the order of time.
        n: number of articles to draw for each; fewer where fewer are left.
        alive_seconds: see above.
        seed: of the draws.

    Returns:
        For each click its candidates: the clicked article among the drawn ones, in random order.
    """
    generator = random.Random(seed)
    order = np.argsort(seconds, kind="stable")
    times, articles = seconds[order].tolist(), items[order].tolist()
    known: dict[int, set[int]] = {}
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        known.setdefault(user, set()).add(item)

    # The articles of a sliding window, as a list that can be drawn from: an article that leaves swaps with the last.
    alive: list[int] = []
    place: dict[int, int] = {}
    counts: dict[int, int] = {}
    begin = end = 0
    candidates: list[list[int]] = []
    for click in clicks.tolist():
        now = int(seconds[click])
        while end < len(times) and times[end] <= now:
            item = articles[end]
            counts[item] = counts.get(item, 0) + 1
            if counts[item] == 1:
                place[item] = len(alive)
                alive.append(item)
            end += 1
        while times[begin] < now - alive_seconds:
            item = articles[begin]
            counts[item] -= 1
            if counts[item] == 0:
                last = alive.pop()
                where = place.pop(item)
                if last != item:
                    alive[where] = last
                    place[last] = where
            begin += 1
        row = _draw(alive, known[int(users[click])], n, generator)  # in random order already
        row.insert(int(generator.random() * (len(row) + 1)), int(items[click]))
        candidates.append(row)
    return candidates


def _draw(alive: list[int], known: set[int], n: int, generator: random.Random) -> list[int]:
    if len(alive) >= 4 * (n + len(known)):  # most draws are good: refuse the others
        chosen: dict[int, None] = {}
        uniform, size = generator.random, len(alive)
        while len(chosen) < n:
            item = alive[int(uniform() * size)]
            if item not in known:
                chosen[item] = None
        return list(chosen)
    left = [item for item in alive if item not in known]
    return generator.sample(left, min(n, len(left)))
