"""Rows of a file become requests and questions; what is neither gets a row that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lightning_rec.recommend import Recommender, Request
from lightning_rec.recommend.explain import explain
from lightning_rec.recommend.rows import ANSWERS, EXPLANATIONS, answer_rows, explanation_rows, wanted_by

Artefacts = Callable[[str], Path]


@pytest.fixture
def recommender(artefact_of: Artefacts) -> Recommender:
    return Recommender.load(artefact_of("id_sequence"))


def _ids(row: dict[str, Any]) -> list[str]:
    return [item["id"] for item in row["items"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "an object of fields, not list"),
        ("null", "id of the user is missing"),
        (None, "id of the user is missing"),
        ({"histroy": []}, "no field 'histroy'. Did you mean 'history'?"),
        ({"zzz": 1}, "The fields are: user, history"),
        ({"user": 7}, "user is an id, a string; here it is 7."),
        ({"user": "\ud800"}, "user is an id"),
        ({"history": "t01"}, "history is a list of ids"),
        ({"history": ["t01", 2]}, "history is a list of ids"),
        ({"history": ["t01"], "times": [0.5]}, "times is a list of whole numbers"),
        ({"history": ["t01"], "times": [2**64]}, "times is a list of whole numbers"),
        ({"history": ["t01"], "times": []}, "one time for each event"),
        ({"text": ["red"]}, "text is a string"),
        ({"k": "three"}, "k is a whole number"),
        ({"k": True}, "k is a whole number"),
        ({"k": 10**30}, "k is a whole number"),
        ({"k": 0}, "at least one item"),
        ({"filter_seen": "no"}, "filter_seen is true or false"),
        ({"where": "tea"}, "where is an object"),
        ({"where": {"categories": {"a": 1}}}, "where is an object"),
        ({"where": {"colour": "red"}}, "which the items do not have"),
        ({"at_most": {"categories": "2"}}, "at_most is an object"),
        ('{"diversity": NaN}', "diversity is a number"),
        ({"diversity": 2}, "between 0 and 1"),
        ({"explore": "greedy"}, "explore is none, ucb or thompson"),
        ({"exploration": float("inf")}, "exploration is a number"),
        ({"seed": 1.5}, "seed is a whole number"),
        ({"text": "red"}, "reads no text"),
    ],
)
def test_what_is_no_request_says_why(recommender: Recommender, row: Any, message: str) -> None:
    rows = answer_rows(recommender, [{"k": 1}, row, {"k": 2}], {})
    assert [len(found["items"]) for found in rows] == [1, 0, 2], "the others are answered"
    assert message in rows[1]["error"]["message"]
    assert json.dumps(rows, ensure_ascii=False).encode()
    assert pa.Table.from_pylist(rows, ANSWERS).num_rows == 3


def test_a_failed_answer_names_the_user(recommender: Recommender) -> None:
    rows = answer_rows(recommender, [{"user": "u001", "k": 0}, {"user": "ä", "text": 3}, '{"user": "b", "kk": 1}'], {})
    assert [row["user"] for row in rows] == ["u001", "ä", "b"]
    assert all(row["error"] for row in rows)


def test_options_stand_in_for_what_a_row_does_not_say(recommender: Recommender) -> None:
    options = wanted_by(Request(user="nobody", k=3, where={"categories": "tea"}, filter_seen=False))
    assert "user" not in options
    assert "history" not in options
    rows = [{"user": "u001"}, {"user": "u001", "k": None, "where": {"categories": ["lamp"]}}, '{"k": 2}']
    found = answer_rows(recommender, rows, options)
    tea = {"k": 3, "where": {"categories": "tea"}, "filter_seen": False}
    wanted = [
        Request(user="u001", **tea),
        Request(user="u001", **(tea | {"where": {"categories": "lamp"}})),
        Request(**(tea | {"k": 2})),
    ]
    assert [_ids(row) for row in found] == [
        [item.id for item in answer.items] for answer in recommender.recommend(wanted)
    ]
    assert all(id_.startswith("t") for id_ in _ids(found[0]))
    assert all(id_.startswith("l") for id_ in _ids(found[1]))


def test_explanations(recommender: Recommender) -> None:
    rows = [
        {"item": "t00", "history": ["t01", "l02"]},
        '{"item": "t00", "user": "u001"}',
        {"user": "u001"},
        {"item": "nothing", "user": "u002"},
        {"item": 3},
        {"item": "t00", "histori": []},
        "{",
        {"item": "t00"},
    ]
    found = explanation_rows(recommender, rows)
    known = explain(recommender, Request(history=["t01", "l02"]), "t00")
    assert found[0]["score"] == pytest.approx(known.score, abs=1e-6)
    assert {reason["id"] for reason in found[0]["reasons"]} == {"t01", "l02"}
    assert found[0]["sentence"] == known.sentence
    assert "user" not in found[0]
    assert (found[1]["user"], found[1]["item"]) == ("u001", "t00")
    told = ["which item is asked about", "no item with the id", "which item is asked about", "'history'", "no JSON"]
    for row, message in zip(found[2:7], told, strict=True):
        assert message in row["error"]["message"]
        assert row["reasons"] == []
    assert (found[3]["user"], found[3]["item"]) == ("u002", "nothing")
    assert "popular" in found[7]["sentence"]
    assert pa.Table.from_pylist(found, EXPLANATIONS).num_rows == len(rows)
