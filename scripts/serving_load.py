#!/usr/bin/env python3
"""The HTTP parts of ``benchmark_serving.py``: the real server as a process, and its clients in another one."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = tuple[str, str]
HOST = "127.0.0.1"


class Server:
    """``lightning-rec serve`` as a process of its own.

    Args:
        artefact: the folder, or a link to it.
        store: the file of histories.
        log: where its output goes.
    """

    def __init__(self, artefact: Path, store: Path, log: Path) -> None:
        self.artefact, self.store, self.log = artefact, store, log
        with socket.socket() as found:
            found.bind((HOST, 0))
            self.port = int(found.getsockname()[1])
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it can answer."""
        settings = {"port": str(self.port), "store": f"sqlite:{self.store}"}
        options = [part for name, value in settings.items() for part in (f"--settings.{name}", value)]
        environment = {name: value for name, value in os.environ.items() if name != "LIGHTNING_REC_KEYS"}
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lightning_rec.cli", "serve", str(self.artefact), *options],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        until = time.monotonic() + 180
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise SystemExit(f"The server ended:\n{self.log.read_text()[-4000:]}")
            try:
                self.get("/readyz")
                return
            except OSError:
                time.sleep(0.1)
        raise SystemExit("The server does not answer.")

    def get(self, path: str) -> bytes:
        """What a call of it gives."""
        with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=10) as response:
            return bytes(response.read())

    def ready(self) -> dict[str, Any]:
        """What it says of itself."""
        found: dict[str, Any] = json.loads(self.get("/readyz"))
        return found

    def send(self, number: signal.Signals, wait: bool = True) -> None:
        """Sends it a signal."""
        assert self.process is not None
        self.process.send_signal(number)
        if wait:
            self.process.wait(timeout=60)


@contextmanager
def served(artefact: Path, folder: Path, name: str) -> Iterator[Server]:
    """A running server, which is ended at the end."""
    store = folder / f"{name}.sqlite"
    for old in folder.glob(f"{name}.sqlite*"):
        old.unlink()
    server = Server(artefact, store, folder / f"{name}.log")
    try:
        server.start()
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.send(signal.SIGTERM)


@contextmanager
def clients(server: Server, kind: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Clients in a process of their own; its output is their report as JSON."""
    command = [sys.executable, str(Path(__file__).resolve()), kind, "--port", str(server.port)]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def report_of(process: subprocess.Popen[str], timeout: float) -> dict[str, Any]:
    """What clients say at the end."""
    out, told = process.communicate(timeout=timeout)
    if process.returncode:
        raise SystemExit(f"The clients failed:\n{told[-4000:]}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


# ---------------------------------------------------------------------- the parts


def measure_http(artefact: Path, folder: Path, n_clients: int, seconds: float, k: int) -> list[Row]:
    """Clients that ask one after the other; each asks again when it has its answer."""
    with (
        served(artefact, folder, "http") as server,
        clients(server, "recommend", clients=n_clients, seconds=seconds, k=k) as process,
    ):
        found = report_of(process, seconds + 120)
        said = server.get("/metrics").decode()
        items = server.ready()["items"]
    joined = _value(said, "batch_size_sum") / max(_value(said, "batch_size_count"), 1)
    p50, p99 = percentile(found["seconds"], 50), percentile(found["seconds"], 99)
    return [
        (
            f"HTTP, {items:,} items, {n_clients} clients on loopback for {seconds:g} s",
            f"{len(found['seconds']) / found['wall']:,.0f} requests a second, p50 {p50 * 1e3:.1f} ms, "
            f"p99 {p99 * 1e3:.1f} ms ({p99 / p50:.1f} ×), {found['errors']} errors, "
            f"{joined:.1f} requests joined on average",
        )
    ]


def measure_events(artefact: Path, folder: Path, n_clients: int, events: int, kills: int) -> list[Row]:
    """Clients write events while the server is killed; what it acknowledged must be there, once."""
    progress = folder / "acknowledged.txt"
    progress.write_text("")
    with served(artefact, folder, "events") as server:
        with clients(server, "events", clients=n_clients, events=events, progress=progress) as process:
            started = time.monotonic()
            down = 0.0
            for kill in range(1, kills + 1):
                while progress.stat().st_size < _LINE * (events * kill // (kills + 1)):
                    if process.poll() is not None:
                        break
                    time.sleep(0.005)
                killed = time.monotonic()
                server.send(signal.SIGKILL)
                server.start()
                down += time.monotonic() - killed
            found = report_of(process, 600)
            up = time.monotonic() - started - down
        store = server.store
    from lightning_rec.serve.sqlite_store import SQLiteStore

    opened = SQLiteStore(store)
    kept = Counter(event.id for user in opened.users(10**6) for event in opened.export(user))
    opened.close()
    acknowledged = [line.strip() for line in progress.read_text().splitlines()]
    lost = sum(1 for id_ in acknowledged if not kept[id_])
    twice = sum(1 for count in kept.values() if count > 1)
    return [
        (
            f"events: {len(set(acknowledged)):,} acknowledged to {n_clients} clients, {kills} × SIGKILL and restart",
            f"{lost} lost, {twice} twice, {len(kept):,} kept; {found['retries']:,} calls sent again, "
            f"{len(acknowledged) / up:,.0f} events a second while it was up",
        )
    ]


def measure_swap(first: Path, second: Path, folder: Path, n_clients: int, swaps: int, k: int) -> list[Row]:
    """Two artefacts, whose items have ids with different first letters, take over from each other under load."""
    link = folder / "served"
    link.unlink(missing_ok=True)
    link.symlink_to(first)
    names: dict[str, str] = {}
    took = []
    with served(link, folder, "swap") as server:
        names[server.ready()["artefact"]] = "a"
        with clients(server, "recommend", clients=n_clients, seconds=0, k=k) as process:
            for number in range(1, swaps + 1):
                time.sleep(1)
                before, folder_now, letter = (
                    server.ready()["artefact"],
                    (second if number % 2 else first),
                    ("b" if number % 2 else "a"),
                )
                new = folder / "served.new"
                new.symlink_to(folder_now)
                os.replace(new, link)
                started = time.monotonic()
                server.send(signal.SIGHUP, wait=False)
                while (after := server.ready()["artefact"]) == before:
                    if time.monotonic() - started > 120:
                        raise SystemExit(f"No swap:\n{server.log.read_text()[-4000:]}")
                    time.sleep(0.05)
                took.append(time.monotonic() - started)
                names[after] = letter
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            found = report_of(process, 60)
    answers = {tuple(key.split(" ")): count for key, count in found["answers"].items()}
    mixed = sum(count for (name, letters), count in answers.items() if names.get(name) != letters)
    return [
        (
            f"swap of artefacts under load of {n_clients} clients, {swaps} times",
            f"{found['errors']} failed of {len(found['seconds']):,} requests, {mixed} answers mixed; "
            f"a swap takes {max(took):.1f} s at most",
        )
    ]


def percentile(values: list[float], percent: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(percent) // 100) - 1)]


def _value(metrics: str, name: str) -> float:
    """The sum of a Prometheus metric over its labels."""
    found = 0.0
    for line in metrics.splitlines():
        if line.split("{")[0].split(" ")[0].endswith(name):
            found += float(line.rsplit(" ", 1)[1])
    return found


# ---------------------------------------------------------------------- the clients' process

_LINE = len("00-000000\n")


def ask(options: argparse.Namespace) -> dict[str, Any]:
    """Clients that ask for users one after the other, until the time is over or they are asked to end."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    seconds: list[float] = []
    errors: list[str] = []
    answers: Counter[str] = Counter()
    lock = threading.Lock()
    users = [f"u{number}" for number in range(1000)]

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(HOST, options.port, timeout=60)
        mine: list[float] = []
        seen: Counter[str] = Counter()
        step = number * 61
        while not stop.is_set():
            body = json.dumps({"user": users[step % len(users)], "k": options.k})
            step += 1
            started = time.perf_counter()
            try:
                connection.request("POST", "/v1/recommend", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                content = response.read()
                if response.status != 200:
                    raise OSError(f"{response.status} {content[:200]!r}")
                mine.append(time.perf_counter() - started)
                answer = json.loads(content)
                letters = "".join(sorted({item["id"][0] for item in answer["items"]}))
                seen[f"{answer['artefact']} {letters}"] += 1
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                connection.close()
                with lock:
                    errors.append(repr(error))
        with lock:
            seconds.extend(mine)
            answers.update(seen)

    wall = _together(options.clients, client, lambda: stop.wait(options.seconds or None), stop)
    return {
        "seconds": seconds,
        "errors": len(errors),
        "first": errors[:3],
        "answers": dict(answers),
        "wall": wall,
    }


def write_events(options: argparse.Namespace) -> dict[str, Any]:
    """Clients that write events one after the other; one that is not acknowledged is sent again until it is."""
    retries = [0] * options.clients
    lock = threading.Lock()

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(HOST, options.port, timeout=30)
        share = options.events // options.clients + (number < options.events % options.clients)
        for step in range(share):
            id_ = f"{number:02d}-{step:06d}"
            event = {"item": f"a{step % 100}", "id": id_}
            body = json.dumps({"user": f"new{number}-{step % 25}", "events": [event]})
            while True:
                try:
                    connection.request("POST", "/v1/events", body, {"Content-Type": "application/json"})
                    response = connection.getresponse()
                    content = response.read()
                    if response.status == 200:
                        break
                    raise SystemExit(f"{response.status} {content[:200]!r}")
                except (OSError, http.client.HTTPException):
                    connection.close()
                    retries[number] += 1
                    time.sleep(0.05)
            with lock:
                progress.write(id_ + "\n")
                progress.flush()

    with open(options.progress, "a", encoding="utf-8") as progress:
        wall = _together(options.clients, client, lambda: None, None)
    return {"retries": sum(retries), "wall": wall}


def _together(
    count: int, work: Callable[[int], None], wait: Callable[[], object], stop: threading.Event | None
) -> float:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    wait()
    if stop is not None:
        stop.set()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def main(arguments: list[str] | None = None) -> int:
    """Runs clients; returns the exit status."""
    parser = argparse.ArgumentParser(description="Clients of the service, for benchmark_serving.py.")
    parser.add_argument("kind", choices=["recommend", "events"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=0, help="0: until SIGTERM")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--events", type=int, default=0)
    parser.add_argument("--progress", help="a file that gets the id of every acknowledged event")
    options = parser.parse_args(arguments)
    print(json.dumps(ask(options) if options.kind == "recommend" else write_events(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
