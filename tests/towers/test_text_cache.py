import multiprocessing
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_rec.towers.language import TextEncoder
from lightning_rec.towers.text_cache import VectorCache, hash_texts

TEXTS = ["red shoe", "", "the old dog", "red shoe"]


def files(folder):
    return sorted((folder / "text_vectors").iterdir())


def test_the_second_time_nothing_is_encoded(tiny_bert, tmp_path):
    first = TextEncoder(tiny_bert, cache_dir=str(tmp_path)).encode_cached(TEXTS)
    again = TextEncoder(tiny_bert, cache_dir=str(tmp_path))
    torch.testing.assert_close(again.encode_cached(TEXTS), first, rtol=0, atol=0)
    assert again.model is None, "the model was not even loaded"
    assert len(files(tmp_path)) == 1


def test_every_setting_has_a_file_of_its_own(tiny_bert, tmp_path):
    changed = tmp_path / "model"
    shutil.copytree(tiny_bert, changed)
    weights = load_file(changed / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][5] += 1
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    cache = str(tmp_path / "cache")
    for count, (model, options, texts) in enumerate(
        [
            (tiny_bert, {}, TEXTS),
            (tiny_bert, {"pooling": "cls"}, TEXTS),
            (tiny_bert, {"max_tokens": 3}, TEXTS),
            (tiny_bert, {"dtype": "bfloat16"}, TEXTS),
            (str(changed), {}, TEXTS),
            (tiny_bert, {}, TEXTS[::-1]),
            (tiny_bert, {}, TEXTS[:3]),
        ],
        start=1,
    ):
        encoder = TextEncoder(model, cache_dir=cache, **options)
        vectors = encoder.encode_cached(texts)
        torch.testing.assert_close(vectors, encoder.encode(texts))
        assert len(files(tmp_path / "cache")) == count


def test_texts_are_told_apart_at_their_seams():
    assert hash_texts(["ab", "c"]) != hash_texts(["a", "bc"])
    assert hash_texts(["a", ""]) != hash_texts(["a"])
    assert hash_texts(["lone \ud800 surrogate"])


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_file_is_encoded_again(tiny_bert, tmp_path, damage):
    encoder = TextEncoder(tiny_bert, cache_dir=str(tmp_path))
    expected = encoder.encode_cached(TEXTS)
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-20])
    elif damage == "flip":
        data[-3] ^= 0x55
        path.write_bytes(data)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        save_file({"vectors": torch.zeros(2, 2)}, path)
    with pytest.warns(UserWarning, match="damaged"):
        torch.testing.assert_close(encoder.encode_cached(TEXTS), expected)
    torch.testing.assert_close(VectorCache(tmp_path).read(path.stem, 4, 16), expected)


def test_a_folder_that_cannot_be_written_costs_the_cache_only(tiny_bert, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.warns(UserWarning, match="Could not store"):
        assert TextEncoder(tiny_bert, cache_dir=str(blocked)).encode_cached(TEXTS).shape == (4, 16)


def _race(model, cache, barrier, results):
    torch.set_num_threads(1)
    encoder = TextEncoder(model, cache_dir=cache)
    barrier.wait()
    results.put(encoder.encode_cached(TEXTS * 50).sum(1).tolist())


def test_two_processes_may_race(tiny_bert, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_race, args=(tiny_bert, str(tmp_path), barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    one, other = results.get(timeout=60), results.get(timeout=60)
    for process in processes:
        process.join()
    assert one == other
    (path,) = files(tmp_path)
    assert VectorCache(tmp_path).read(path.stem, 200, 16).sum(1).tolist() == one
