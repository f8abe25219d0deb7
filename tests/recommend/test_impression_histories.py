"""The history that an artefact of impressions has of a user, and what the store adds to it."""

from types import SimpleNamespace

import numpy as np
import pytest

from lightning_rec.data.impressions import Impressions
from lightning_rec.recommend.export_impressions import newest_histories
from lightning_rec.recommend.interests import _merged
from lightning_rec.recommend.types import Event


def log(*impressions):
    """Impressions of one user, each of a history, what was shown, and how many of it, the first ones, were clicked."""
    histories, shown, clicked = zip(*impressions, strict=True)
    ends = np.cumsum([len(part) for part in histories])
    return Impressions(
        ids=[str(number) for number in range(len(impressions))],
        users=np.ones(len(impressions), dtype=np.int64),
        times=np.arange(100, 100 + len(impressions)),
        starts=np.concatenate([[0], np.cumsum([len(part) for part in shown])]),
        candidates=np.array([row for part in shown for row in part], dtype=np.int32),
        labels=np.concatenate([np.arange(len(part)) < n for part, n in zip(shown, clicked, strict=True)]).astype(
            np.int8
        ),
        history_starts=ends - [len(part) for part in histories],
        history_ends=ends,
        history=np.array([row for part in histories for row in part], dtype=np.int32),
    )


@pytest.mark.parametrize(
    ("impressions", "expected"),
    [
        # as MIND: one history for all impressions, then the clicks of all
        ([([1, 2], [5, 9], 1), ([1, 2], [6, 9], 1), ([1, 2], [7, 9], 1)], [1, 2, 5, 6, 7]),
        # the last two clicks each: 1 and 2 fell out of it long ago
        (
            [([], [1, 9], 1), ([1], [2, 9], 1), ([1, 2], [3, 9], 1), ([2, 3], [4, 9], 1), ([3, 4], [5, 9], 1)],
            [1, 2, 3, 4, 5],
        ),
        # whole histories: nothing but the newest click is not in the newest one
        ([([], [1, 9], 1), ([1], [2, 9], 1), ([1, 2], [3, 9], 1)], [1, 2, 3]),
        ([([], [9], 0)], []),
    ],
)
def test_clicks_stand_where_they_were(impressions, expected):
    data = SimpleNamespace(impressions=log(*impressions), user_ids=["", "u"])
    (offsets, rows), times = newest_histories(data)
    assert rows.tolist() == expected
    assert offsets.tolist() == [0, len(expected)]
    assert times is None


def test_what_the_log_has_comes_once():
    fitted = [Event("a"), Event("b")]
    stored = [Event("b", 90), Event("c", 95), Event("a", 120)]
    found = [event.item for event in _merged(fitted, stored, until=100)]
    assert found == ["a", "b", "c", "a"], "c is not in the log, and a was read again after its end"
    assert _merged(fitted, stored, None) == [*fitted, *stored], "nothing tells when the log ends"
    timed = [Event("a", 10), Event("b", 90)]
    assert [event.time for event in _merged(timed, stored, None)] == [10, 90, 95, 120]
