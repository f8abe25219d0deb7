"""Answers for a whole file of requests by Ray Data, where one machine is too small."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from lightning_rec.recommend.ann import IndexName, make_index
from lightning_rec.recommend.files import (
    batches,
    is_parquet,
    parquet_files,
    read_parquet,
    read_rows,
    read_users,
    row_groups,
)
from lightning_rec.recommend.lives import moment
from lightning_rec.recommend.recommender import Recommender
from lightning_rec.recommend.rows import ANSWERS, answer_rows

_LINES = 4096  # that travel together


class _Worker:
    """One process of Ray, with a recommender of its own."""

    def __init__(self, artefact: str, options: Mapping[str, Any], index: IndexName, now: int | None) -> None:
        self._recommender = Recommender.load(artefact, make_index(index), now=now)
        self._options = options

    def __call__(self, part: pa.Table) -> Iterator[pa.Table]:
        for rows in batches(_rows(part)):
            yield pa.Table.from_pylist(answer_rows(self._recommender, rows, self._options), ANSWERS)


def answer_with_ray(
    artefact: str | os.PathLike[str],
    source: str,
    options: Mapping[str, Any],
    index: IndexName = "exact",
    workers: int = 1,
    users: bool = False,
    now: int | str | None = None,
) -> Iterator[dict[str, Any]]:
    """Answers a file of requests; the answers are those of the local engine, in the order of the file.

    A Ray that runs already is used, also that of ``RAY_ADDRESS``; the artefact, and a Parquet file of requests, must
    then be readable under the same path on all machines. Otherwise Ray is started on this machine for the time being.

    Args:
        artefact: what ``lightning-rec export`` wrote.
        source: a file of requests or of users, see ``lightning-rec recommend --help``. Parquet of requests is read by
            the workers, a group of rows at a time; lines and users are read here and handed to them.
        options: fields of requests that do not say them, such as ``{"k": 5}``.
        index: ``exact``, ``hnsw`` or ``ivfpq``.
        workers: most processes that answer, each with a recommender of its own.
        users: ``source`` is a file of users.
        now: the moment of the requests, see ``lightning-rec recommend --help``.

    Yields:
        One row an answer; what is no request gets a row with an ``error``.

    Raises:
        RuntimeError: Ray is not installed.
        FileNotFoundError: there is no such file.
        ValueError: fewer than one worker, or a source that cannot be read.
    """
    try:
        import ray.data
    except ImportError as error:
        raise RuntimeError('The engine ray needs Ray: run `pip install "lightning-rec[ray]"`.') from error
    if workers < 1:
        raise ValueError(f"workers is {workers}: somebody has to answer, so give at least 1.")
    if is_parquet(source) and not users:
        parts = _groups(str(Path(source).absolute()))
    else:
        parts = _lines(read_users(source) if users else read_rows(source))
    if not parts:
        return
    make_index(index)
    Recommender.load(artefact, now=moment(now))  # what is wrong with it is said here, and not by a worker
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would call its maker
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    log = logging.getLogger("ray.data")
    before = context.execution_options.preserve_order, context.enable_progress_bars, log.level
    log.setLevel(logging.ERROR)  # it tells its plan and its progress
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    try:
        # one step only: with a reader beside it, a machine of one core would wait for ever
        answers = ray.data.from_arrow(parts).map_batches(
            _Worker,
            fn_constructor_args=(str(Path(artefact).absolute()), dict(options), index, moment(now)),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
            num_cpus=1,
        )
        for batch in answers.iter_batches(batch_size=None, batch_format="pyarrow"):
            table: Any = batch  # the type covers other formats too
            for row in table.to_pylist():
                yield {name: value for name, value in row.items() if value is not None or name == "path"}
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = before[:2]
        log.setLevel(before[2])
        if started:
            ray.shutdown()


def _groups(source: str) -> list[pa.Table]:
    """A part for each group of rows of the Parquet files of a source."""
    return [
        pa.table({"file": [path], "group": [group]}) for path in parquet_files(source) for group in row_groups(path)
    ]


def _lines(rows: Iterator[Any]) -> list[pa.Table]:
    """Requests as parts of some lines of JSON."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    parts = []
    while chunk := list(islice(lines, _LINES)):
        # bytes that were no UTF-8 stand as surrogates, which JSON writes as \\udcXX and Arrow does not take
        parts.append(pa.table({"line": [line.encode("utf-8", "backslashreplace").decode("utf-8") for line in chunk]}))
    return parts


def _rows(part: pa.Table) -> Iterator[Any]:
    if "line" in part.column_names:
        yield from part.column("line").to_pylist()
        return
    for group in part.to_pylist():
        yield from read_parquet(group["file"], group["group"])
