"""An artefact, made once, and the service over it."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_rec.cli import main
from lightning_rec.recommend.export import export

TESTS = Path(__file__).parent.parent
SHOP = TESTS / "data" / "files" / "shop"


def fitted_artefact(folder: Path, name: str, tiny_bert: str, epochs: int = 1) -> Path:
    """Fits a config of tests/configs and exports it."""
    text = (TESTS / "configs" / f"{name}.yaml").read_text()
    for word, value in (("SHOP", str(SHOP)), ("TINY_BERT", tiny_bert)):
        text = text.replace(word, value)
    (folder / "given.yaml").write_text(text)
    options = ["--trainer.default_root_dir", str(folder), "--trainer.max_epochs", str(epochs)]
    main(["fit", "--config", str(folder / "given.yaml"), *options])
    export(next(folder.rglob("last.ckpt")), folder / "artefact", progress=False)
    return folder / "artefact"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str) -> Path:
    """An artefact with a text tower, a recurrent user tower and a cosine score. Not to be changed."""
    return fitted_artefact(tmp_path_factory.mktemp("served"), "text_pooled", tiny_bert)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server of its own, below a new folder."""
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("redis-server is not installed (Debian: apt install redis-server)")
    pytest.importorskip("redis", reason="the extra redis is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen([server, *options], stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def artefact_of(tmp_path: Path, tiny_bert: str) -> Callable[[str], Path]:
    """Makes an artefact of another config of tests/configs: ``artefact_of("matrix_factorisation")``."""
    return lambda name: fitted_artefact(tmp_path, name, tiny_bert)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, which the test may change."""
    return Path(shutil.copytree(made, tmp_path / "artefact"))


@pytest.fixture
def serve(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes the service: ``serve(folder=..., keys=[...], max_k=5)``; it is closed after the test.

    It has measured its scores when the test gets it: that thread asks the recommender too, and a test that counts calls
    would count them now and then.
    """
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    from lightning_rec.serve.app import create_app
    from lightning_rec.serve.settings import Settings

    opened = []

    def make(source: Any = None, keys: str = "", **settings: Any) -> Any:
        monkeypatch.setenv("LIGHTNING_REC_KEYS", keys)
        settings = {"store": "memory:", "warm_up": False} | settings
        opened.append(create_app(made if source is None else source, Settings(**settings)))
        for thread in threading.enumerate():
            if thread.name == "warm-up":
                thread.join(10)
        return opened[-1]

    yield make
    for app in opened:
        app.service.close()
    for thread in threading.enumerate():  # none goes on into the next test
        if thread.name in ("warm-up", "reload", "coarse-scan"):
            thread.join(10)


@pytest.fixture
def ask() -> Callable[..., Any]:
    """Makes calls and gives their responses: ``ask(app, ("GET", "/healthz"), ("POST", "/v1/recommend", {"k": 3}))``.

    One call alone gives one response; all are made one after the other.
    """
    httpx = pytest.importorskip("httpx", reason="httpx is not installed")

    def run(app: Any, *calls: tuple[Any, ...], headers: dict[str, str] | None = None) -> Any:
        async def all_of_them() -> list[Any]:
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
                found = []
                for method, path, *rest in calls:
                    body: dict[str, Any] = {}
                    if rest:
                        kind = "content" if isinstance(rest[0], bytes) else "json"
                        body = {kind: rest[0]}
                        if kind == "content":
                            body["headers"] = {"content-type": "application/json"}
                    found.append(await client.request(method, path, **body))
                return found

        found = asyncio.run(all_of_them())
        return found[0] if len(calls) == 1 else found

    return run


@pytest.fixture
def within() -> Callable[..., Any]:
    """Runs ``work(client)`` with a client of the service, for calls at the same time."""
    httpx = pytest.importorskip("httpx", reason="httpx is not installed")

    def run(app: Any, work: Callable[[Any], Awaitable[Any]]) -> Any:
        async def go() -> Any:
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await work(client)

        return asyncio.run(go())

    return run
