#!/usr/bin/env python3
"""Shows what a run on MovieLens-100K came to: test metrics beside a baseline's, films for three users, its files.

Reads what the commands wrote (``test_metrics.json`` of ``lightning-rec test`` in both run folders and
``predictions.parquet`` of ``lightning-rec predict``) and the tables that ``scripts/fetch_movielens.py`` fetched.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import fetch_movielens
import pyarrow.parquet as pq

Row = dict[str, str]


def read_tables(folder: Path) -> tuple[list[Row], dict[str, Row]]:
    """Reads the interactions, oldest first, and the films by id, from either form of the data.

    The names of the columns lose the type behind the colon: ``user_id:token`` is ``user_id``.
    """
    if (folder / "ml-100k.inter").is_file():
        files = {name: (folder / name).read_bytes() for name in ("ml-100k.inter", "ml-100k.item")}
    else:
        files = fetch_movielens.convert({name: (folder / name).read_bytes() for name in fetch_movielens.ORIGINAL})

    def rows(name: str) -> list[Row]:
        lines = csv.reader(io.StringIO(files[name].decode()), delimiter="\t", quoting=csv.QUOTE_NONE)
        names = [column.split(":")[0] for column in next(lines)]
        return [dict(zip(names, line, strict=True)) for line in lines]

    events = sorted(rows("ml-100k.inter"), key=lambda row: float(row["timestamp"]))
    return events, {row["item_id"]: row for row in rows("ml-100k.item")}


def newest(folder: Path, name: str) -> Path:
    """The newest file of that name below a folder: every fit has a folder of its own there."""
    found = sorted(folder.rglob(name), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"There is no {name} below {folder}: the command that writes it has not run.")
    return found[-1]


def metrics_table(ours: dict[str, Any], baseline: dict[str, Any]) -> str:
    """Formats the ranking metrics that both runs have, one a line."""
    names = [name for name in ours if "@" in name and name in baseline]
    width = max(map(len, names), default=0)
    lines = [f"{'':{width}}  two-tower  popularity"]
    lines += [f"{name:{width}}  {float(ours[name]):9.4f}  {float(baseline[name]):10.4f}" for name in names]
    return "\n".join(lines)


def pick_users(lengths: dict[str, int], number: int = 3) -> list[str]:
    """Picks users spread over short and long histories, always the same ones."""
    ordered = sorted(lengths, key=lambda user: (lengths[user], user))
    return [ordered[len(ordered) * (2 * step + 1) // (2 * number)] for step in range(min(number, len(ordered)))]


def film(item: str, films: dict[str, Row]) -> str:
    """Title, year and raw id of a film."""
    row = films.get(item)
    return f"{row['movie_title']} ({row['release_year']}) [{item}]" if row else f"[{item}]"


def users_text(predictions: list[dict[str, Any]], events: list[Row], films: dict[str, Row], shown: int = 5) -> str:
    """What three users watched last and what is recommended to them."""
    recommended: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in predictions:
        if row["item_id"]:
            recommended[row["user_id"]].append(row)
    watched: dict[str, list[Row]] = defaultdict(list)
    for event in events:
        if event["user_id"] in recommended:
            watched[event["user_id"]].append(event)
    lines = []
    for user in pick_users({user: len(history) for user, history in watched.items()}):
        lines.append(f"\nUser {user} watched {len(watched[user])} films, the last of them:")
        lines += [f"     {film(row['item_id'], films)}, {row['rating']} stars" for row in watched[user][-shown:]]
        lines.append("  Recommended:")
        best = sorted(recommended[user], key=lambda row: row["rank"])[:shown]
        lines += [f"  {place}. {film(row['item_id'], films)}" for place, row in enumerate(best, 1)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(description="Shows what a run on MovieLens-100K came to.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--baseline", type=Path, required=True, help="folder of the baseline's run")
    options = parser.parse_args(arguments)
    paths = [newest(run, "test_metrics.json") for run in (options.run, options.baseline)]
    ours, baseline = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    predictions = newest(options.run, "predictions.parquet")
    print(f"\n{ours['protocol']}\n")
    print(metrics_table(ours["metrics"], baseline["metrics"]))
    print(users_text(pq.read_table(predictions).to_pylist(), *read_tables(options.data)))
    print(f"\nCheckpoint:   {ours['checkpoint']}")
    print(f"Config:       {newest(options.run, 'config.yaml')}")
    print(f"Metrics:      {paths[0]}")
    print(f"Predictions:  {predictions}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
