"""Attributes that must match: found by an index of each field, whatever the type of a value, and of living items."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_rec.recommend import Request
from lightning_rec.recommend.recommender import Recommender
from lightning_rec.recommend.rerank import Fields, Quota, RowsByValue, matching, values_of


@pytest.fixture
def shop(artefact_of: Callable[[str], Path]) -> Recommender:
    return Recommender.load(artefact_of("text_pooled"))


def test_values_have_one_spelling() -> None:
    assert values_of(None) == values_of("") == values_of([]) == values_of(float("nan")) == []
    assert values_of(True) == values_of("true") == ["true"]
    assert values_of(1) == values_of(1.0) == values_of("1") == ["1"]
    assert values_of("1.0") == ["1.0"], "text stays as it is written"
    assert values_of([False, 2.0, 0.5, "x", None]) == ["false", "2", "0.5", "x"]


def test_matching_is_what_a_loop_over_all_items_finds() -> None:
    random = np.random.default_rng(0)
    values = [None, "", "a", "b", ["a", "c"], ["b"], [], True, 1.0, "1", "true", ["a", "a"]]
    columns = {name: [values[n] for n in random.integers(0, len(values), 200)] for name in ("x", "y")}
    fields = Fields(columns)
    for where in (
        {"x": "a"}, {"x": ["a", "b"], "y": 1}, {"y": True}, {"x": "none has it"}, {"x": None}, {"x": []}, {},
    ):  # fmt: skip
        wanted = [
            all(set(values_of(part)) & set(values_of(columns[name][row])) for name, part in where.items())
            for row in range(200)
        ]
        assert matching(where, fields, 200).tolist() == wanted
        assert matching(where, columns, 200).tolist() == wanted


def test_rows_of_a_value_are_sorted() -> None:
    rows = RowsByValue([None, "b", ["a", "b"], "a", "b"])
    assert rows["a"].tolist() == [2, 3]
    assert rows["b"].tolist() == [1, 2, 4]
    assert rows["c"].tolist() == RowsByValue([])["c"].tolist() == []


def test_a_field_is_looked_through_once(monkeypatch: pytest.MonkeyPatch, shop: Recommender) -> None:
    made: list[int] = []
    original = RowsByValue.__init__

    def counted(self: RowsByValue, column: list[object]) -> None:
        made.append(len(column))
        original(self, column)

    monkeypatch.setattr(RowsByValue, "__init__", counted)
    request = Request(where={"categories": "tea"}, k=50)
    before = shop.recommend([request] * 5)[0]
    threads = [threading.Thread(target=shop.recommend, args=(request,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    shop.remove_items([before.items[0].id])  # no attribute changed
    assert [item.id for item in shop.recommend(request).items] == [item.id for item in before.items[1:]]
    assert len(made) == 1
    shop.add_items([{"item_id": "new", "title": "White tea", "categories": ["tea", "new"]}])
    found = {item.id for item in shop.recommend(request).items}
    assert found == {item.id for item in before.items[1:]} | {"new"}
    assert len(made) == 2
    shop.update_items([{"item_id": "new", "categories": "lamp"}])
    assert "new" not in {item.id for item in shop.recommend(request).items}


def test_typed_values_of_new_items_match(shop: Recommender) -> None:
    shop.add_items([{"item_id": "typed", "title": "lamp", "adult": True, "size": 1.0, "price": 2.5, "sizes": [1, 2.0]}])

    def found(**where: object) -> list[str]:
        return [item.id for item in shop.recommend(Request(where=where, k=50)).items]

    for where in (
        {"adult": True}, {"adult": "true"}, {"size": 1}, {"size": 1.0}, {"size": "1"}, {"price": 2.5}, {"sizes": 2},
    ):  # fmt: skip
        assert found(**where) == ["typed"], where
    for where in ({"adult": False}, {"size": 2}, {"price": 2}):
        assert found(**where) == []


def test_a_quota_counts_one_value_once() -> None:
    quota = Quota({"x": 2}, {"x": [None, 1, 1.0, "1", None]})
    assert [quota.take(row) for row in range(1, 5)] == [True, True, False, True]


def test_an_item_that_comes_again_has_only_its_new_fields(shop: Recommender) -> None:
    shop.remove_items(["t00"])
    shop.add_items([{"item_id": "t00", "title": "Steel hammer"}])
    assert shop.item("t00") == {"item_id": "t00", "text": "Steel hammer", "title": "Steel hammer"}
    row = shop.state.rows["t00"]
    assert row == 1
    assert shop.state.texts[row] == shop.artefact.item_text({"title": "Steel hammer"})
    alone = shop.artefact.encode_texts([shop.state.texts[row]])[0]
    torch.testing.assert_close(shop.state.raw[row], alone, atol=1e-5, rtol=1e-4)
    assert "t00" not in {item.id for item in shop.recommend(Request(where={"categories": "tea"}, k=50)).items}
    shop.update_items([{"item_id": "t00", "categories": "tool"}])
    assert shop.item("t00")["title"] == "Steel hammer", "a living item keeps what it is not told"
    assert shop.artefact.attributes["title"][row] == "Green tea", "what the artefact says is not changed"
