"""Another artefact takes over under load: no failed call, and no answer of two catalogues."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from lightning_rec.recommend import Recommender
from lightning_rec.recommend.artefact import ITEMS, Artefact
from lightning_rec.recommend.context import ContextIndex, ScoreContext
from lightning_rec.recommend.index import ExactIndex
from lightning_rec.recommend.manifest import MANIFEST, file_digest


@pytest.fixture
def other(tmp_path, folder):
    """A second artefact, in which every title ends in ``*``."""
    path = tmp_path / "other"
    shutil.copytree(folder, path)
    table = pq.read_table(path / ITEMS)
    titles = pa.array([f"{text}*" for text in table.column("display").to_pylist()])
    pq.write_table(table.set_column(table.column_names.index("display"), "display", titles), path / ITEMS)
    manifest = Artefact.read(folder).manifest
    digests = manifest.digests | {ITEMS: file_digest(path / ITEMS)}
    (path / MANIFEST).write_text(replace(manifest, digests=digests).to_json(), encoding="utf-8")
    Artefact.read(path)
    return path


@pytest.fixture
def link(tmp_path, folder):
    """A link to the artefact that is served, and what points it elsewhere."""
    path = tmp_path / "current"
    path.symlink_to(folder)

    def point(to):
        new = tmp_path / "new"
        new.symlink_to(to)
        new.replace(path)

    return path, point


def test_a_first_look_is_prepared_only_where_it_answers(serve, folder, monkeypatch):
    """Where the moment adds to scores, another index answers."""
    holder, prepared = serve(folder).service.holder, []
    monkeypatch.setattr(ExactIndex, "prepare", lambda index: prepared.append(index))
    recommender = Recommender.load(folder)
    assert holder.prepare(recommender).shares
    assert prepared == [recommender.state.index]
    nothing = ScoreContext(None, None, np.full(len(recommender.state), np.inf), None)
    recommender._state = replace(recommender.state, context=nothing)
    assert isinstance(recommender.state.at(0).index, ContextIndex)
    assert holder.prepare(recommender).shares
    assert len(prepared) == 1


def test_swaps_under_load_fail_no_call_and_mix_no_catalogues(serve, within, link, folder, other):
    path, point = link
    app = serve(path, warm_up=True)

    async def work(client):
        found, running = [], True
        assert (await client.post("/v1/recommend", json={"text": "lamp"})).json()["path"] == "text"

        async def ask(number):
            while running:
                kind = number % 3
                if kind == 0:
                    body = {"requests": [{"user": "u001", "k": 5}, {"history": ["t01"], "k": 5}, {"k": 5}]}
                else:
                    body = {"user": "u002", "k": 8} if kind == 1 else {"text": "green lamp", "k": 5}
                response = await client.post("/v1/recommend", json=body)
                assert response.status_code == 200, response.text
                found.extend(response.json().get("answers", [response.json()]))
                if kind == 0:
                    assert len({answer["artefact"] for answer in response.json()["answers"]}) == 1

        asking = [asyncio.create_task(ask(number)) for number in range(6)]
        names = [app.service.served.name]
        for number in range(10):
            await asyncio.sleep(0.02)
            point(folder if number % 2 else other)
            answer = await client.post("/v1/reload")
            assert answer.status_code == 200, answer.text
            names.append(answer.json()["artefact"])
        running = False
        await asyncio.gather(*asking)
        return names, found

    names, found = within(app, work)
    assert len(set(names)) == 2
    assert names[::2] == [names[0]] * 6
    assert {answer["artefact"] for answer in found} == set(names)
    for answer in found:
        starred = {item["text"].endswith("*") for item in answer["items"]}
        assert starred == {answer["artefact"] == names[1]}, answer


def test_histories_and_changed_items_outlive_a_swap(serve, ask, link, other):
    path, point = link
    app = serve(path)
    event = {"user": "new", "events": [{"item": "t01"}]}
    ask(app, ("POST", "/v1/events", event), ("POST", "/v1/items", {"items": [{"item_id": "n", "title": "new"}]}))
    point(other)
    swapped, answer, item = ask(
        app, ("POST", "/v1/reload"), ("POST", "/v1/recommend", {"user": "new", "k": 1}), ("GET", "/v1/items/n")
    )
    assert swapped.json()["items"] == 31
    assert answer.json()["path"] == "towers"
    assert answer.json()["artefact"] == swapped.json()["artefact"]
    assert item.json() == {"item_id": "n", "text": "new", "title": "new"}


def test_a_broken_artefact_leaves_the_old_one_serving(serve, ask, link, other):
    path, point = link
    app = serve(path)
    name = app.service.served.name
    (other / "items.parquet").write_bytes(b"broken")
    point(other)
    reloaded, ready, answer = ask(
        app, ("POST", "/v1/reload"), ("GET", "/readyz"), ("POST", "/v1/recommend", {"user": "u001", "k": 1})
    )
    assert reloaded.status_code == 409
    assert reloaded.json()["code"] == "reload_failed"
    assert "items.parquet" in reloaded.json()["message"]
    assert ready.status_code == 200
    assert ready.json()["last_reload"]["done"] is False
    assert ready.json()["artefact"] == name
    assert str(other) not in ready.text  # whoever asks without a key need not know where things are
    assert answer.json()["artefact"] == name
    assert 'lightning_rec_reloads_total{result="failed"} 1.0' in ask(app, ("GET", "/metrics")).text


def test_words_without_their_language_model(serve, ask, link, other):
    path, point = link
    app = serve(path, warm_up=False)
    point(other)
    asked = {"requests": [{"text": "lamp"}, {"user": "u001", "k": 1}]}
    words, both, item, _, after = ask(
        app,
        ("POST", "/v1/recommend", {"text": "lamp"}),
        ("POST", "/v1/recommend", asked),
        ("POST", "/v1/items", {"items": [{"item_id": "n", "title": "new"}]}),
        ("POST", "/v1/reload"),
        ("POST", "/v1/recommend", {"text": "lamp"}),
    )
    for response in (words, item):
        assert (response.status_code, response.json()["code"]) == (503, "artefact_replaced")
    assert [answer.get("path") for answer in both.json()["answers"]] == [None, "towers"]
    assert after.json()["path"] == "text"


def test_two_reloads_at_once(serve, within):
    app = serve()

    async def work(client):
        return await asyncio.gather(*(client.post("/v1/reload") for _ in range(4)))

    codes = sorted(response.status_code for response in within(app, work))
    assert codes[0] == 200
    assert set(codes) <= {200, 409}


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP on this system")
def test_signals(made, tmp_path):
    """SIGHUP reloads, SIGTERM ends the process by itself, and the log tells no id."""
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "from lightning_rec.serve.server import run\nfrom lightning_rec.serve.settings import Settings\n"
        f"run({str(made)!r}, Settings(port={port}, store='sqlite:{tmp_path}/events.sqlite'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LIGHTNING_REC_KEYS"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )

    def get(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
            return response.read().decode()

    try:
        for _ in range(600):
            assert process.poll() is None, process.communicate()
            try:
                assert '"last_reload":null' in get("/readyz")
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        process.send_signal(signal.SIGHUP)
        for _ in range(200):
            if '"done":true' in get("/readyz"):
                break
            time.sleep(0.05)
        else:
            raise AssertionError("SIGHUP did not reload.")
        with pytest.raises(urllib.error.HTTPError):
            get("/v1/items/someone-secret")
    finally:
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM), errors
    assert "/v1/items/{item_id:path}" in output
    assert "secret" not in output + errors


def test_asked_while_one_is_loading_it_loads_the_newest(serve, link, other, monkeypatch):
    path, point = link
    app = serve(path)
    first, real, loads = app.service.served.name, Recommender.load, []
    loading, leave = threading.Event(), threading.Event()

    def slow(*args, **options):
        found = real(*args, **options)
        loads.append(found)
        loading.set()
        assert leave.wait(10)
        return found

    monkeypatch.setattr(Recommender, "load", slow)
    app.service.reload_soon()
    assert loading.wait(10)
    point(other)
    for _ in range(5):
        app.service.reload_soon()
    leave.set()
    for _ in range(200):
        if app.service.served.name != first:
            break
        time.sleep(0.05)
    assert app.service.served.name != first
    time.sleep(0.3)
    assert 2 <= len(loads) <= 3


def test_a_call_under_way_is_answered_before_the_service_ends(serve):
    uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    app = serve(batch_wait_ms=500)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/recommend"
    found = []

    def ask():
        call = urllib.request.Request(url, b'{"k": 2}', {"Content-Type": "application/json"})
        with urllib.request.urlopen(call, timeout=10) as response:
            found.append(response.status)

    asking = threading.Thread(target=ask)
    asking.start()
    while not server.server_state.tasks:
        time.sleep(0.01)
    server.should_exit = True  # what SIGTERM sets
    asking.join(10)
    thread.join(10)
    assert found == [200]
    assert not thread.is_alive()
