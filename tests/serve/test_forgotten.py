"""Whom one replica forgets, the others and later processes do not know either."""

import shutil

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from lightning_rec.recommend import Event, Recommender
from lightning_rec.serve.forgotten import ENTRY, Forgotten
from lightning_rec.serve.stores import open_store


@pytest.fixture(params=["memory:", "sqlite:"])
def store(request, tmp_path):
    opened = open_store(request.param + (str(tmp_path / "events.sqlite") if request.param == "sqlite:" else ""))
    yield opened
    opened.close()


def test_replicas_of_one_store_learn_of_it(made, store):
    here, there = Recommender.load(made, store=store), Recommender.load(made, store=store)
    mine, theirs = Forgotten(store), Forgotten(store)
    assert theirs.apply(there) == 0
    assert there.history("u001")
    mine.add("u001")
    here.forget("u001")
    assert theirs.apply(there) == 1
    assert there.history("u001") == here.history("u001") == []
    assert there.history("u002")
    assert theirs.apply(there) == 0  # looked for once
    mine.add("u001")  # and noted once
    assert len(store.export(ENTRY)) == 1
    later = Recommender.load(made, store=store)
    assert Forgotten(store).apply(later, everyone=True) == 1
    assert later.history("u001") == []


def test_who_comes_back_has_a_new_history(made, store):
    recommender, forgotten = Recommender.load(made, store=store), Forgotten(store)
    forgotten.add("u001")
    recommender.forget("u001")
    recommender.update("u001", [Event("t01", 5)])
    assert [event.item for event in recommender.history("u001")] == ["t01"]


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="there is no redis-server on this machine")
def test_over_redis(made, tmp_path):
    pytest.importorskip("redis", reason="the extra redis is not installed")
    import subprocess
    import time

    path = tmp_path / "socket"
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            if path.exists():
                break
            time.sleep(0.05)
        store = open_store(f"unix://{path}")
        test_replicas_of_one_store_learn_of_it(made, store)
        store.close()
    finally:
        server.terminate()
        server.wait(10)
