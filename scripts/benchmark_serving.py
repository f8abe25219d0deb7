#!/usr/bin/env python3
"""Measures what a fitted run answers: one user, many users, over HTTP, while it is killed, and while it is replaced.

It makes its own artefacts: a data set of random items, one step of ``lightning-rec fit``, and ``export``. The parts:

- ``one``: ``Recommender.recommend`` for one user, in turns with the bare matrix product and top-k of the same shapes;
- ``batch``: 1,024 users beside RecTools' ``TorchRanker`` and implicit's ``topk`` on the same matrices, in turns,
  each in a process of its own; answers are compared. With seen items left out, as they are used, and with all items;
- ``http``: 16 clients on loopback;
- ``events``: events written by 8 clients while the server is killed and started again;
- ``swap``: other artefacts take over under load;
- ``load``: opening the artefact.

RecTools pins older packages, so it lives in an environment of its own; see ``benchmark_fit.py``. The rest needs
``pip install "lightning-rec[serve]"``; implicit is measured where it is installed. Then::

    .venv/bin/python scripts/benchmark_serving.py --rectools-python .venv-rectools/bin/python
    .venv/bin/python scripts/benchmark_serving.py --only one,load --items 20000    # a quick look
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from serving_artefact import make_artefact
from serving_load import measure_events, measure_http, measure_swap

if TYPE_CHECKING:
    from lightning_rec.recommend import Recommender

Row = tuple[str, str]
PARTS = ("one", "batch", "http", "events", "swap", "load")
_WARM_UP = 150  # calls


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call took, and what it returned."""
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


# ---------------------------------------------------------------------- one user


def measure_one(recommender: Recommender, k: int, rounds: int) -> list[Row]:
    """One user by the recommender and by a bare product and top-k, in turns."""
    import torch

    from lightning_rec.recommend import Request

    users = recommender.users(1000)
    vectors = recommender.state.ready
    interest = torch.randn(1, vectors.shape[1])
    seconds: dict[str, list[float]] = defaultdict(list)
    with torch.inference_mode():
        for number in range(_WARM_UP):
            recommender.recommend(Request(user=users[number % len(users)], k=k))
        index = recommender.state.index
        index.prepare()  # a first look in eight bits, as the service prepares it when it starts
        for number in range(rounds):
            request = Request(user=users[number % len(users)], k=k)
            ours, answer = timed(partial(recommender.recommend, request))
            bare, _ = timed(lambda: torch.mm(interest, vectors.t()).topk(k, dim=1))
            assert len(answer.items) == k
            seconds["ours"].append(ours)
            seconds["bare"].append(bare)
            read, found = timed(partial(recommender.interests.read, [request], recommender.state))
            seconds["tower"].append(read)
            vector = found[0].vector
            assert vector is not None
            seconds["search"].append(timed(partial(index.search, vector[None], k))[0])
    tower, search = (median(seconds[side]) * 1e3 for side in ("tower", "search"))
    ours, bare = (median(seconds[side]) * 1e3 for side in ("ours", "bare"))
    return [
        (
            f"recommend, one user, exact, {len(vectors) - 1:,} items × {vectors.shape[1]}",
            f"median {ours:.2f} ms, bare product and top-k {bare:.2f} ms: {ours / bare:.2f} ×, {ours - bare:+.2f} ms; "
            f"of it reading the user {tower:.2f} ms and the search {search:.2f} ms",
        )
    ]


# ---------------------------------------------------------------------- many users


def rank(side: str, matrices: Path, k: int, rounds: int) -> dict[str, Any]:
    """One turn of a ranker over saved matrices: seconds of each round, and the last answers, for both kinds of filter.

    Args:
        side: ``ours``, ``rectools`` or ``implicit``.
        matrices: ``interest`` ``(b, d)``, ``items`` ``(n, d)``, and ``seen`` ``(b, s)``, in an ``.npz``.
        k: number of items.
        rounds: number of rounds, after one that warms up.
    """
    saved = np.load(matrices)
    interest, items, seen = saved["interest"], saved["items"], saved["seen"]
    work: Callable[[bool], tuple[Any, Any]] = {"ours": _ours, "rectools": _rectools, "implicit": _implicit}[side](
        interest, items, seen, k
    )
    found: dict[str, Any] = {}
    for kind, filtered in (("seen items left out", True), ("all items", False)):
        seconds = []
        for _ in range(rounds + 1):
            taken, (rows, scores) = timed(partial(work, filtered))
            seconds.append(taken)
        shape = (len(interest), k)
        found[kind] = {
            "seconds": seconds[1:],
            "rows": np.asarray(rows).reshape(shape).tolist(),
            "scores": np.asarray(scores, dtype=np.float64).reshape(shape).tolist(),
        }
    return found


def _ours(interest: Any, items: Any, seen: Any, k: int) -> Callable[[bool], tuple[Any, Any]]:
    import torch

    from lightning_rec.recommend import ExactIndex

    index = ExactIndex(torch.cat([torch.zeros(1, items.shape[1]), torch.from_numpy(items)]))  # row 0 is padding
    users = torch.from_numpy(interest)
    excluded = list(torch.from_numpy(seen) + 1)

    def work(filtered: bool) -> tuple[Any, Any]:
        scores, rows = index.search(users, k, excluded if filtered else None)
        return rows.numpy() - 1, scores.numpy()

    return work


def _pairs(seen: Any, n: int) -> Any:
    from scipy import sparse

    b, s = seen.shape
    ones = np.ones(b * s, dtype=np.float32)
    return sparse.csr_matrix((ones, seen.ravel(), np.arange(0, b * s + 1, s)), shape=(b, n))


def _rectools(interest: Any, items: Any, seen: Any, k: int) -> Callable[[bool], tuple[Any, Any]]:
    from rectools.models.rank import Distance, TorchRanker

    ranker = TorchRanker(Distance.DOT, "cpu", interest, items)
    pairs = _pairs(seen, len(items))

    def work(filtered: bool) -> tuple[Any, Any]:
        return ranker.rank(np.arange(len(interest)), k=k, filter_pairs_csr=pairs if filtered else None)[1:]

    return work


def _implicit(interest: Any, items: Any, seen: Any, k: int) -> Callable[[bool], tuple[Any, Any]]:
    from implicit.cpu.topk import topk

    pairs = _pairs(seen, len(items))

    def work(filtered: bool) -> tuple[Any, Any]:
        rows, scores = topk(items, interest, k, filter_query_items=pairs if filtered else None)
        return rows, scores

    return work


def same_answers(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Compares two rankings; rows with equal scores may come in any order.

    Raises:
        SystemExit: the answers differ.
    """
    scores, others = np.asarray(ours["scores"]), np.asarray(theirs["scores"])
    rows, rows_there = np.asarray(ours["rows"]), np.asarray(theirs["rows"])
    off = float(np.abs(scores - others).max() / np.abs(others).max())
    if off > 1e-5:
        raise SystemExit(f"The answers differ: a score by {off:.1e} of the highest.")
    return f"scores equal to {off:.0e}, {np.mean(rows == rows_there):.2%} of places the same item"


def measure_batch(
    recommender: Recommender, folder: Path, users: int, k: int, rounds: int, rectools: Path | None
) -> list[Row]:
    """Many users beside other rankers."""
    from lightning_rec.recommend import Request

    state = recommender.state
    requests = [Request(user=user, k=k) for user in recommender.users(users)]
    interests = recommender.interests.read(requests, state)
    matrices = folder / "matrices.npz"
    np.savez(
        matrices,
        interest=np.stack([part.vector.numpy() for part in interests if part.vector is not None]),
        items=state.ready[1:].numpy(),
        seen=np.asarray([part.seen for part in interests]) - 1,
    )
    sides = {"ours": sys.executable}
    if rectools is not None:
        sides["rectools"] = str(rectools)
    if importlib.util.find_spec("implicit") is not None:
        sides["implicit"] = sys.executable
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    answers: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for side, python in sides.items():
            out = folder / "answer.json"
            command = [python, str(Path(__file__).resolve()), "--side", side, "--matrices", str(matrices)]
            command += ["--answer", str(out), "--k", str(k), "--rounds", str(rounds)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
            if done.returncode:
                raise SystemExit(f"The side {side} failed:\n{done.stderr[-4000:]}")
            answers[side] = json.loads(out.read_text())
            for kind, found in answers[side].items():
                seconds[side, kind].extend(found["seconds"])
    rows = []
    for kind in answers["ours"]:
        ours = len(requests) / median(seconds["ours", kind])
        for side in sides:
            if side == "ours":
                continue
            theirs = len(requests) / median(seconds[side, kind])
            same = same_answers(answers["ours"][kind], answers[side][kind])
            rows.append(
                (
                    f"batch of {len(requests):,} users, {len(state) - 1:,} items, {kind}, against {side}",
                    f"{ours:,.0f} against {theirs:,.0f} users a second: {ours / theirs:.2f} ×; {same}",
                )
            )
    whole = median([timed(lambda: recommender.recommend(requests))[0] for _ in range(rounds)])
    rows.append(
        (
            f"the same by Recommender.recommend, from {len(requests):,} user ids to answers",
            f"{len(requests) / whole:,.0f} users a second",
        )
    )
    return rows


# ---------------------------------------------------------------------- loading


def measure_load(artefact: Path, rounds: int) -> list[Row]:
    """Opens an artefact, each time in a new process, from after the imports to the first answer."""
    code = (
        "import sys, time\nfrom lightning_rec.recommend import Recommender, Request\nstarted = time.perf_counter()\n"
        "recommender = Recommender.load(sys.argv[1])\nloaded = time.perf_counter()\n"
        "recommender.recommend(Request(user=recommender.users(1)[0]))\n"
        "print(loaded - started, time.perf_counter() - loaded, recommender.n_items)"
    )
    found = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", code, str(artefact)], capture_output=True, text=True, check=True)
        found.append([float(value) for value in done.stdout.split()])
    load, first = (median(row[place] for row in found) for place in (0, 1))
    return [
        (
            f"load of an artefact with {int(found[0][2]):,} items, digests checked",
            f"{load:.2f} s, and {first:.2f} s to the first answer",
        )
    ]


# ---------------------------------------------------------------------- all of it


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measures answers from an artefact, in Python and over HTTP.")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to measure (default: {','.join(PARTS)})")
    parser.add_argument("--rectools-python", type=Path, help="python of the environment that holds RecTools 0.19")
    parser.add_argument("--items", type=int, default=100_000, help="items of the catalogue (default: 100000)")
    parser.add_argument("--dim", type=int, default=128, help="width of the vectors (default: 128)")
    parser.add_argument("--users", type=int, default=1024, help="users of the batch (default: 1024)")
    parser.add_argument("--k", type=int, default=10, help="items of an answer (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--calls", type=int, default=300, help="calls of the part one (default: 300)")
    parser.add_argument("--seconds", type=float, default=60, help="length of the part http (default: 60)")
    parser.add_argument("--clients", type=int, default=16, help="clients of http and swap (default: 16)")
    parser.add_argument("--events", type=int, default=20_000, help="events of the part events (default: 20000)")
    parser.add_argument("--kills", type=int, default=5, help="kills during the part events (default: 5)")
    parser.add_argument("--swaps", type=int, default=10, help="swaps of the part swap (default: 10)")
    parser.add_argument("--folder", type=Path, help="keeps what is made, and uses artefacts that are there already")
    for hidden in ("--side", "--matrices", "--answer"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.parts = [part for part in options.only.split(",") if part]
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"There is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}.")
    return options


def measure(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Makes the artefacts and measures the parts; prints each row when it is there."""
    users = max(options.users, 1000)
    artefacts = {}
    for prefix in ("a", "b") if "swap" in options.parts else ("a",):
        place = folder / f"{prefix}_{options.items}x{options.dim}_{users}"
        there = (place / "artefact").is_dir()
        artefacts[prefix] = (
            place / "artefact" if there else make_artefact(place, prefix, options.items, users, options.dim)
        )
    rows: list[Row] = []

    def add(found: list[Row]) -> None:
        rows.extend(found)
        for what, figure in found:
            print(f"| {what} | {figure} |", flush=True)

    if {"one", "batch"} & set(options.parts):
        from lightning_rec.recommend import Recommender

        recommender = Recommender.load(artefacts["a"])
        if "one" in options.parts:
            add(measure_one(recommender, options.k, options.calls))
        if "batch" in options.parts:
            add(measure_batch(recommender, folder, options.users, options.k, options.rounds, options.rectools_python))
        del recommender
    if "http" in options.parts:
        add(measure_http(artefacts["a"], folder, options.clients, options.seconds, options.k))
    if "events" in options.parts:
        add(measure_events(artefacts["a"], folder, 8, options.events, options.kills))
    if "swap" in options.parts:
        add(measure_swap(artefacts["a"], artefacts["b"], folder, options.clients, options.swaps, options.k))
    if "load" in options.parts:
        add(measure_load(artefacts["a"], options.rounds))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    options = parse(arguments)
    if options.side:
        Path(options.answer).write_text(
            json.dumps(rank(options.side, Path(options.matrices), options.k, options.rounds))
        )
        return 0
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        rows = measure(options, options.folder.resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(options, Path(folder))
    print("\n| what | figure |\n| --- | --- |")
    for what, figure in rows:
        print(f"| {what} | {figure} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
