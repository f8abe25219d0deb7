import numpy as np
import pytest
import torch

from lightning_rec.towers.state_cache import StateCache, as_stored, rows_of


def ones(array):
    array[:] = 1


def never(array):
    raise AssertionError("made again")


def test_made_once_and_mapped(tmp_path):
    cache = StateCache(tmp_path)
    first = cache.get("key", (3, 2), "float16", ones)
    assert isinstance(first, np.memmap)
    first[0] = 7  # copy-on-write: the file keeps its values
    again = cache.get("key", (3, 2), "float16", never)
    assert again.dtype == np.float16
    assert (again == 1).all()


def test_a_damaged_file_is_made_again(tmp_path):
    cache = StateCache(tmp_path)
    cache.get("key", (3, 2), "float32", ones)
    with cache.path("key").open("r+b") as file:
        file.truncate(140)
    with pytest.warns(UserWarning, match="are damaged"):
        assert (cache.get("key", (3, 2), "float32", ones) == 1).all()
    with pytest.warns(UserWarning, match=r"holds float32 \(3, 2\) where float16 \(3, 2\) is due"):
        assert cache.get("key", (3, 2), "float16", ones).dtype == np.float16


def test_a_failure_leaves_nothing(tmp_path):
    cache = StateCache(tmp_path)
    with pytest.raises(AssertionError):
        cache.get("key", (3, 2), "float32", never)
    assert not list(cache.folder.iterdir())


def test_a_full_disk_costs_the_cache_not_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.warns(UserWarning, match="10 are free"):
        array = StateCache(tmp_path).get("key", (3, 2), "float32", ones)
    assert (array == 1).all()
    assert not StateCache(tmp_path).path("key").exists()


def test_nothing_at_all(tmp_path):
    assert StateCache(tmp_path).get("key", (0, 2), "float32", never).shape == (0, 2)


def test_rows_and_rounding():
    array = np.arange(6, dtype=np.float16).reshape(3, 2)
    assert rows_of(array, torch.tensor([[2, 0]])).tolist() == [[[4, 5], [0, 1]]]
    assert rows_of(array, torch.tensor([1])).dtype == torch.float32
    assert as_stored(torch.tensor([1e9, -1e9, 0.1]), "float16").tolist() == pytest.approx(
        [65504, -65504, 0.1], rel=1e-3
    )
    assert as_stored(torch.tensor([1e9]), "float32").tolist() == [1e9]
