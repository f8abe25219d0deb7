"""Event logs folded into sessions, against a plain loop and by hand."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_rec.data.readers import BadRowError, EventSessions, RawImpressions
from lightning_rec.data.readers.alive import sample_alive

START = 1573600000
MINUTE = 60


def event(user: str, minute: float, article: str | None = None, **more: Any) -> dict[str, Any]:
    record: dict[str, Any] = {"eventId": f"{user}{minute}{article}", "userId": user, "url": "https://news.example/x"}
    record["time"] = START + int(minute * MINUTE)
    if article is not None:
        record |= {"id": article, "title": f"Title {article}", "category1": "news|local"}
    return record | more


LOG = [
    event("u", 0),  # the front page
    event("u", 1, "a", activeTime=20),
    event("v", 2, "b"),
    event("u", 5, "c", activeTime=7),
    event("u", 6, "a", activeTime=4),  # again, in the same session
    event("v", 20, "d", activeTime=1.5),
    event("u", 100, "a"),  # the next session
    event("w", 101, "e"),
]


def write(path: Path, events: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in events), encoding="utf-8")
    return str(path)


def clicks(raw: RawImpressions) -> list[tuple[str, str, int, str]]:
    rows = []
    for row in raw.impressions.to_list():
        clicked = [item for item, label in zip(row["candidates"], row["labels"], strict=True) if label]
        assert len(clicked) == 1
        rows.append((row["impression_id"], row["user_id"], (row["timestamp"] - START) // MINUTE, clicked[0]))
    return rows


def test_sessions_by_hand(tmp_path: Path) -> None:
    raw = EventSessions(write(tmp_path / "log.jsonl", LOG), alive_hours=1).read()
    assert clicks(raw) == [
        ("1-1", "u", 1, "a"), ("3-1", "v", 2, "b"), ("1-2", "u", 5, "c"), ("3-2", "v", 20, "d"),
        ("2-1", "u", 100, "a"), ("4-1", "w", 101, "e"),
    ]  # fmt: skip
    rows = raw.impressions.to_list()
    others = [set(row["candidates"]) - {clicked} for row, (*_, clicked) in zip(rows, clicks(raw), strict=True)]
    # v read b at 2 and d at 20; u reads a and c; an hour later only what was read at 100 is alive.
    assert others == [set(), {"a"}, {"b"}, {"a", "c"}, set(), {"a"}]
    dwell = [
        [value for value, label in zip(row["dwell"], row["labels"], strict=True) if label][0]  # noqa: RUF015  # one
        for row in rows
    ]
    assert dwell[0] == 24.0  # summed over the session
    assert dwell[2:4] == [7.0, 1.5]
    assert math.isnan(dwell[1])
    assert all(math.isnan(value) for row in rows for value, label in zip(row["dwell"], row["labels"], strict=True)
               if not label)  # fmt: skip
    assert "history" not in raw.impressions.column_names
    assert raw.report.rows == {"events": 8, "sessions": 4, "impressions": 6, "items": 5}
    text = str(raw.report)
    assert "The candidates are sampled" in text
    assert "1 of 8 events have no article" in text
    assert "1 events repeat an article of their session" in text
    assert "6 of 6 clicks have fewer than 4 such articles" in text
    assert raw.items is not None
    assert raw.items[0] == {
        "item_id": "a", "title": "Title a", "category": "news", "subcategory": "local", "published": START + MINUTE,
    }  # fmt: skip
    assert raw.items["item_id"][:] == ["a", "b", "c", "d", "e"]


def test_the_gap_and_the_flags(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", LOG)
    assert EventSessions(path, gap_minutes=94).read().report.rows["sessions"] == 3
    assert EventSessions(path, gap_minutes=93.9).read().report.rows["sessions"] == 4
    assert EventSessions(path, gap_minutes=4).read().report.rows["sessions"] == 5
    with pytest.raises(ValueError, match="the log has no session_start"):
        EventSessions(path, boundaries="flags").read()
    flagged = [record | {"sessionStart": False, "sessionStop": False} for record in LOG]
    flagged[3]["sessionStart"] = True  # u at 5
    flagged[2]["sessionStop"] = True  # v at 2
    raw = EventSessions(write(tmp_path / "flags.jsonl", flagged), boundaries="flags").read()
    by_user = {(user, minute): name.split("-")[0] for name, user, minute, _ in clicks(raw)}
    assert by_user[("u", 1)] != by_user[("u", 5)]
    assert by_user[("v", 2)] != by_user[("v", 20)]
    assert ("u", 100) not in by_user  # the same session as at 6: one click
    assert raw.report.rows["sessions"] == 5


def test_times_of_publication(tmp_path: Path) -> None:
    events = [
        event("u", 1, "a", publishtime="2019-11-12T10:00:00.000Z"),
        event("v", 3, "b"),
        event("v", 2, "b", publishtime="soon"),
    ]
    raw = EventSessions(write(tmp_path / "log.jsonl", events)).read()
    assert raw.items is not None
    assert raw.items["published"][:] == [1573552800, START + 2 * MINUTE]
    assert "The time of publication of 1 articles cannot be read" in str(raw.report)


def test_bad_events_and_duplicates(tmp_path: Path) -> None:
    events = [
        LOG[1],
        LOG[1],
        event("", 2, "b"),
        LOG[2],
        event("u", 3, "b", time="later"),
        event("u", 3, "b", activeTime=-1),
    ]
    path = write(tmp_path / "log.jsonl", events)
    with pytest.raises(BadRowError, match=r"log.jsonl, line 3: the user_id is empty"):
        EventSessions(path).read()
    raw = EventSessions(path, on_bad_rows="skip").read()
    assert [row.line for row in raw.report.skipped] == [3, 5, 6]
    assert raw.report.n_duplicates == 1
    assert raw.report.rows["events"] == 2
    with pytest.raises(ValueError, match="no column looks like `timestamp`"):
        EventSessions(write(tmp_path / "bare.jsonl", [{"userId": "u", "id": "a"}])).read()
    with pytest.raises(ValueError, match="names an article"):
        EventSessions(write(tmp_path / "front.jsonl", [event("u", 1, id="")])).read()
    with pytest.raises(ValueError, match="above 0"):
        EventSessions(path, gap_minutes=0)


def test_the_address_stands_for_an_article_without_an_id(tmp_path: Path) -> None:
    events = [{"userId": "u", "time": START, "url": "https://n.example/1"}]
    raw = EventSessions(write(tmp_path / "log.jsonl", events)).read()
    assert raw.impressions["candidates"][:] == [["https://n.example/1"]]
    events = [{"who": "u", "at": START, "doc": "1", "what": "x", "seconds": 3}]
    columns: dict[str, Any] = {"user_id": "who", "timestamp": "at", "item_id": "doc", "dwell": "seconds"}
    raw = EventSessions(write(tmp_path / "own.jsonl", events), columns=columns).read()
    assert raw.impressions["dwell"][:] == [[3.0]]
    with pytest.raises(ValueError, match="there is no field `item`"):
        EventSessions(str(tmp_path / "own.jsonl"), columns=columns | {"item": "doc"}).read()


def random_log(n: int, seed: int) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    return [
        event(f"u{generator.randrange(12)}", generator.randrange(3000), f"n{generator.randrange(25)}") for _ in range(n)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_a_plain_loop_agrees(tmp_path: Path, seed: int) -> None:
    """Sessions and eligible articles, against the rules written out one event at a time."""
    events = random_log(300, seed)
    path = write(tmp_path / "log.jsonl", events)
    raw = EventSessions(path, gap_minutes=45, alive_hours=5, negatives=3, seed=seed).read()
    distinct = {record["eventId"]: record for record in events}
    reads = sorted(distinct.values(), key=lambda record: record["time"])
    known: dict[str, set[str]] = {}
    for record in reads:
        known.setdefault(record["userId"], set()).add(record["id"])
    expected = Counter()
    eligible = {}
    for user in known:
        last, seen = -math.inf, set()
        for record in (record for record in reads if record["userId"] == user):
            if record["time"] - last > 45 * MINUTE:
                seen = set()
            last = record["time"]
            if record["id"] not in seen:
                seen.add(record["id"])
                expected[(user, record["time"], record["id"])] += 1
                alive = {r["id"] for r in reads if record["time"] - 5 * 3600 <= r["time"] <= record["time"]}
                eligible[(user, record["time"])] = alive - known[user]
    found = Counter((user, START + minute * MINUTE, item) for _, user, minute, item in clicks(raw))
    assert found == expected
    for row in raw.impressions.to_list():
        others = [item for item, label in zip(row["candidates"], row["labels"], strict=True) if not label]
        left = eligible[(row["user_id"], row["timestamp"])]
        assert len(set(others)) == len(others) == min(3, len(left))
        assert set(others) <= left
    names = raw.impressions["impression_id"][:]
    assert len(set(names)) == len(names)
    times = raw.impressions["timestamp"][:]
    assert times == sorted(times)


def test_the_seed_decides(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", random_log(200, 9))
    first, again, other = (EventSessions(path, seed=seed).read().impressions[:] for seed in (1, 1, 2))
    assert first == again
    assert first["candidates"] != other["candidates"]
    assert clicks(EventSessions(path, seed=1).read()) == clicks(EventSessions(path, seed=2).read())


@pytest.mark.parametrize("n_items", [6, 60])
def test_draws_are_uniform_whatever_the_popularity(n_items: int) -> None:
    """Both ways of drawing: from a list of what is left, and by refusal."""
    reads = [item for item in range(n_items) for _ in range(1 + 5 * (item % 3))]
    count = 6000
    items = np.array([*reads, *[0] * count])
    users = np.array([*[1] * len(reads), *[2] * count])
    seconds = np.array([*[0] * len(reads), *[10] * count])
    rows = sample_alive(seconds, items, users, np.arange(len(reads), len(items)), 2, 100, seed=3)
    drawn = Counter(item for row in rows for item in row)
    assert drawn.pop(0) == count
    expected = 2 * count / (n_items - 1)
    assert len(drawn) == n_items - 1
    assert all(abs(n - expected) < 5 * math.sqrt(expected) for n in drawn.values())
    places = Counter(row.index(0) for row in rows)  # the click's place tells nothing
    assert all(abs(n - count / 3) < 5 * math.sqrt(count / 3) for n in places.values())
