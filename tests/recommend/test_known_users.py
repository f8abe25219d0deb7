"""What is known of a user: all that was seen, and one history of the fitted data and the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from lightning_rec.recommend import Event, MemoryStore, Request
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.interests import READ_EVENTS
from lightning_rec.recommend.recommender import Recommender
from lightning_rec.recommend.store import HistoryStore
from lightning_rec.recommend.stored_users import StoredUsers, users_table
from lightning_rec.serve.sqlite_store import SQLiteStore

Artefacts = Callable[[str], Path]


class _Plain(MemoryStore):
    """A store of one's own, which has only what every store must have."""

    items = HistoryStore.items


@pytest.fixture(params=["memory", "sqlite", "plain"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> HistoryStore:
    if request.param == "sqlite":
        return SQLiteStore(tmp_path / "events.sqlite")
    return MemoryStore() if request.param == "memory" else _Plain()


def _fit(artefact: Artefact, events: Sequence[tuple[str, int | None]], times: bool = True) -> Artefact:
    """Gives an artefact one user, ``u``, as a refit to these items and times would."""
    rows = np.array([artefact.ids.index(item) for item, _ in events])
    moments = np.array([time for _, time in events]) if times else None
    table = users_table(["u"], (np.array([0, len(rows)]), rows), moments, None)
    artefact.users = StoredUsers(table, artefact.ids)
    return artefact


def _told(recommender: Recommender) -> list[tuple[str, int | None]]:
    return [(event.item, event.time) for event in recommender.history("u")]


def test_items_are_those_of_all_events(store: HistoryStore) -> None:
    assert store.items("u") == set()
    store.append("u", [Event("a", 1), Event("b", 2), Event("a", 3)])
    store.append("v", [Event("c", 1)])
    assert store.items("u") == {"a", "b"}
    store.delete("u")
    assert store.items("u") == set()


def test_seen_is_all_that_the_store_has(artefact_of: Artefacts, store: HistoryStore) -> None:
    recommender = Recommender.load(artefact_of("text_pooled"), store=store)
    ids = recommender.artefact.ids[1:]
    again = [Event(ids[0], 1000 + number) for number in range(READ_EVENTS + 1)]
    recommender.update("u", [Event(id_, time) for time, id_ in enumerate(ids[:-2])] + again)
    answer = recommender.recommend(Request(user="u", k=100, filter_seen=True))
    assert {item.id for item in answer.items} == set(ids[-2:])
    assert len(recommender.history("u")) == READ_EVENTS, "what is read stays bounded"


def test_seen_is_all_that_the_run_was_fitted_to(artefact: Artefact) -> None:
    ids = artefact.ids[1:]
    fitted = [(id_, time) for time, id_ in enumerate(ids[:-2])] + [(ids[0], 1000 + n) for n in range(READ_EVENTS)]
    recommender = Recommender(_fit(artefact, fitted))
    for new in ([], [Event(ids[-1], 9999)] * READ_EVENTS):
        recommender.update("u", new)
        answer = recommender.recommend(Request(user="u", k=100, filter_seen=True))
        assert {item.id for item in answer.items} == set(ids[-2:-1] if new else ids[-2:])
    recommender.forget("u")
    assert len(recommender.recommend(Request(user="u", k=100)).items) == len(ids)


def test_a_refit_and_a_reload_count_no_event_twice(artefact_of: Artefacts) -> None:
    store = MemoryStore()
    before = Recommender(_fit(Artefact.read(artefact_of("id_sequence")), [("t01", 10), ("t02", 20)]), store=store)
    before.update("u", [Event("t03", 30), Event("t01", 40), Event("new", 50)])
    history = _told(before)
    assert history == [("t01", 10), ("t02", 20), ("t03", 30), ("t01", 40), ("new", 50)]
    # the next run is fitted to all but the item that its catalogue lacks, and one more event came meanwhile
    after = Recommender(_fit(Artefact.read(artefact_of("id_sequence")), history[:-1]), store=store)
    assert _told(after) == history
    after.update("u", [Event("t04", 60)])
    assert _told(after) == [*history, ("t04", 60)]
    by_user = after.recommend(Request(user="u", k=3))
    by_history = after.recommend(Request(history=[item for item, _ in _told(after)], k=3))
    assert [item.id for item in by_user.items] == [item.id for item in by_history.items]
    assert [event.item for event in after.history("u", 3)] == ["t01", "new", "t04"]
    assert after.history("u", 0) == []


def test_one_history_is_in_the_order_of_time(artefact: Artefact) -> None:
    recommender = Recommender(_fit(artefact, [("t01", 10), ("t02", 30), ("t03", 30)]))
    recommender.update("u", [Event("t04", 20), Event("t05", 30), Event("t02", 31), Event("t06", 5)])
    assert [item for item, _ in _told(recommender)] == ["t06", "t01", "t04", "t02", "t03", "t05", "t02"]
    state = recommender.state
    read = recommender.interests.read([Request(user="u")], state)[0].history
    assert [state.ids[row] for row in read] == [item for item, _ in _told(recommender)][-len(read) :]


def test_without_times_the_store_comes_last(artefact: Artefact) -> None:
    recommender = Recommender(_fit(artefact, [("t01", 0), ("t02", 0)], times=False))
    recommender.update("u", [Event("t02", 20), Event("t03", 10)])
    assert _told(recommender) == [("t01", None), ("t02", None), ("t03", 10), ("t02", 20)]
