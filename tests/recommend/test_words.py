"""Words are left out one at a time where the tower reads them, and others get at the language model in between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_rec.recommend import Request
from lightning_rec.recommend import words as words_module
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.recommender import Recommender

ENCODED = list[int]


@pytest.fixture
def shop(artefact_of: Callable[[str], Path]) -> Recommender:
    recommender = Recommender.load(artefact_of("text_pooled"))
    description = " ".join(f"red shoe {number}" for number in range(400))
    recommender.add_items([{"item_id": "long", "title": "lamp", "description": description}])
    return recommender


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> ENCODED:
    """Number of texts of each call."""
    sizes: ENCODED = []
    original = Artefact.encode_texts

    def counted(self: Artefact, texts: Sequence[str]) -> Tensor:
        sizes.append(len(texts))
        return original(self, texts)

    monkeypatch.setattr(Artefact, "encode_texts", counted)
    return sizes


def test_only_words_that_the_tower_reads_are_left_out(shop: Recommender, encoded: ENCODED) -> None:
    artefact = shop.artefact
    text = shop.state.texts[shop.state.rows["long"]]
    encoder = artefact.item_tower.encoder
    ends = encoder.tokenizer(text, truncation=True, max_length=encoder.max_tokens, return_offsets_mapping=True)
    last = max(end for _, end in ends["offset_mapping"])
    read = len(text[:last].split())
    assert 1 < read < len(text.split())
    found = shop.explain(Request(history=["t01"]), "long", words="occlusion").words
    assert [word.text for word in found] == text.split()
    assert sum(encoded) == read + 1
    assert max(encoded) <= words_module._CHUNK
    assert {word.effect for word in found[read:]} == {0.0}
    vector = shop.interests.read([Request(history=["t01"])], shop.state)[0].vector
    assert vector is not None
    parts = text.split(" ")
    for place in (0, read // 2, read - 1):
        rest = " ".join(parts[:place] + parts[place + 1 :])
        with torch.no_grad():
            scores = artefact.ready(artefact.encode_texts([text, rest])) @ vector
        assert found[place].effect == pytest.approx(float(scores[0] - scores[1]), abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_short_text_is_read_whole(shop: Recommender, encoded: ENCODED, n: int) -> None:
    text = " ".join(["red", "shoe", "green", "lamp", "boot"][:n])
    shop.add_items([{"item_id": "short", "title": text}])
    encoded.clear()
    assert len(shop.explain(Request(history=["t01"]), "short", words="occlusion").words) == n
    assert encoded == [n + 1]


def test_others_get_at_the_language_model_in_between(
    shop: Recommender, monkeypatch: pytest.MonkeyPatch, encoded: ENCODED
) -> None:
    monkeypatch.setattr(words_module, "_CHUNK", 2)
    begun, done = threading.Event(), threading.Event()
    original = shop.artefact.item_tower.encode_texts
    order: list[str] = []

    def slow(texts: Sequence[str]) -> Tensor:
        if threading.current_thread() is other:
            order.append("other")
        else:
            order.append("words")
            begun.set()
            if len(order) > 1:
                done.wait(0.05)  # the lock is held meanwhile
        return original(texts)

    def ask() -> None:
        assert begun.wait(10)
        shop.recommend(Request(text="red shoe"))
        done.set()

    other = threading.Thread(target=ask)
    monkeypatch.setattr(shop.artefact.item_tower, "encode_texts", slow)
    other.start()
    shop.explain(Request(history=["t01"]), "long", words="occlusion")
    other.join()
    assert order.count("words") > 5
    assert order.index("other") < len(order) - 2, order
