"""The exact index finds what a sort of all scores finds."""

from __future__ import annotations

import pytest
import torch

from lightning_rec.recommend.index import ExactIndex, highest


@pytest.mark.parametrize(("b", "n", "k"), [(1, 50, 5), (8, 20_011, 10), (9, 128 * 40, 10), (16, 30_000, 1), (3, 7, 6)])
def test_same_as_a_sort(b: int, n: int, k: int) -> None:
    random = torch.Generator().manual_seed(b)
    vectors, interest = torch.randn(n, 16, generator=random), torch.randn(b, 16, generator=random)
    excluded = [torch.randint(1, n, (row % 4,), generator=random) for row in range(b)]
    scores, rows = ExactIndex(vectors).search(interest, k, excluded)
    wanted = interest @ vectors.t()
    wanted[:, 0] = -torch.inf
    for row, out in enumerate(excluded):
        wanted[row, out] = -torch.inf
    sorted_scores, sorted_rows = wanted.sort(dim=1, descending=True)
    torch.testing.assert_close(scores, sorted_scores[:, : scores.shape[1]], atol=1e-5, rtol=1e-5)
    finite = scores > -torch.inf
    assert torch.equal(rows[finite], sorted_rows[:, : scores.shape[1]][finite])
    assert (rows[~finite] == 0).all()


def test_many_equal_scores_at_the_border_of_blocks() -> None:
    scores = torch.zeros(8, 128 * 50 + 3)
    scores[:, [0, 127, 128, 6400, 6402]] = 1.0
    found, rows = highest(scores, 5)
    assert (found == 1).all()
    assert sorted(rows[0].tolist()) == [0, 127, 128, 6400, 6402]


def test_dead_rows_padding_and_more_than_there_is() -> None:
    vectors = torch.ones(5, 2)
    index = ExactIndex().build(vectors, torch.tensor([True, False, True, False, False]))
    scores, rows = index.search(torch.ones(2, 2), 10, [torch.tensor([1, 3, 4]), torch.tensor([], dtype=torch.int64)])
    assert rows[0].tolist() == [0, 0, 0, 0]
    assert sorted(rows[1].tolist()) == [0, 1, 3, 4]
    assert (scores[0] == -torch.inf).all()


def test_no_user_and_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, interest = torch.randn(300, 4), torch.randn(20, 4)
    assert ExactIndex(vectors).search(interest[:0], 5)[0].shape == (0, 5)
    whole = ExactIndex(vectors).search(interest, 5)
    monkeypatch.setattr("lightning_rec.recommend.index._ELEMENTS", 700)
    parts = ExactIndex(vectors).search(interest, 5)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("b", [1, 9])
def test_of_equal_scores_the_lower_rows_come_in_order(b: int) -> None:
    random = torch.Generator().manual_seed(b)
    scores = torch.randint(0, 40, (b, 128 * 60 + 5), generator=random).float()
    scores[0, 5:] = -torch.inf
    for k in (1, 7, 12):
        found, columns = highest(scores, k)
        wanted, order = scores.sort(dim=1, descending=True, stable=True)
        assert torch.equal(found, wanted[:, :k])
        assert torch.equal(columns, order[:, :k].masked_fill(wanted[:, :k] == -torch.inf, 0))
    found, columns = highest(torch.zeros(b, 4), 4)
    assert columns.tolist() == [[0, 1, 2, 3]] * b
