"""Contributions are what they say: taking an item or a word away changes the score by its effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_rec.recommend import Event, Explanation, Reason, Request, RequestError, Word
from lightning_rec.recommend.explain import Sentences, explain
from lightning_rec.recommend.html import to_html
from lightning_rec.recommend.recommender import Recommender

Artefacts = Callable[[str], Path]


@pytest.mark.parametrize("config", ["id_sequence", "text_pooled"])
def test_an_effect_is_the_change_of_the_score(artefact_of: Artefacts, config: str) -> None:
    recommender = Recommender.load(artefact_of(config))
    ids = recommender.artefact.ids[1:]
    history = [ids[2], ids[0], ids[4], ids[0]]
    answer = recommender.recommend(Request(history=history, k=1))
    item = answer.items[0].id
    found = explain(recommender, Request(history=history), item)
    assert found.score == pytest.approx(answer.items[0].score, abs=1e-5)
    # an item that comes twice has one reason, at the place of its newest event
    assert {reason.id: reason.place for reason in found.reasons} == {ids[2]: 0, ids[4]: 2, ids[0]: 3}
    assert len(found.reasons) == 3
    assert [abs(r.effect) for r in found.reasons] == sorted((abs(r.effect) for r in found.reasons), reverse=True)
    for reason in found.reasons:
        rest = [id_ for id_ in history if id_ != reason.id]
        without = float(recommender.score(Request(history=rest), [item])[0])
        assert found.score - without == pytest.approx(reason.effect, abs=1e-5)
    first = next((reason for reason in found.reasons if reason.effect > 0), None)
    if first is not None:
        assert first.text in found.sentence


def test_a_history_longer_than_the_tower_reads(artefact_of: Artefacts) -> None:
    recommender = Recommender.load(artefact_of("id_sequence"))
    limit = recommender.artefact.manifest.max_history
    ids = recommender.artefact.ids[1:]
    history = [*ids[: limit + 3], ids[1]]  # the oldest event of ids[1] is not read any more
    found = explain(recommender, Request(history=history), ids[0])
    assert sorted(reason.place for reason in found.reasons) == list(range(limit))
    assert {reason.id for reason in found.reasons} == set(history[-limit:])
    for reason in found.reasons:
        rest = [id_ for id_ in history if id_ != reason.id]
        without = float(recommender.score(Request(history=rest), [ids[0]])[0])
        assert found.score - without == pytest.approx(reason.effect, abs=1e-5)


def test_the_history_of_a_user_and_no_history(artefact_of: Artefacts) -> None:
    recommender = Recommender.load(artefact_of("id_sequence"))
    ids = recommender.artefact.ids[1:]
    recommender.update("u", [Event(ids[1], 1), Event("unknown", 2), Event(ids[3], 3)])
    found = recommender.explain(Request(user="u"), ids[0])
    assert {reason.id for reason in found.reasons} == {ids[1], ids[3]}
    nobody = recommender.explain(Request(user="nobody"), ids[0])
    assert nobody.reasons == []
    assert "popular" in nobody.sentence
    assert f"{int(recommender.artefact.counts[1]):,}" in nobody.sentence
    with pytest.raises(RequestError, match="no item"):
        recommender.explain(Request(user="u"), "unknown")


def test_words_by_occlusion(artefact_of: Artefacts) -> None:
    recommender = Recommender.load(artefact_of("text_pooled"))
    artefact = recommender.artefact
    row = max(range(1, len(artefact.ids)), key=lambda row: len(artefact.texts[row].split()))
    request = Request(history=artefact.ids[1:3])
    found = recommender.explain(request, artefact.ids[row], words="occlusion")
    words = artefact.texts[row].split()
    assert [word.text for word in found.words] == words
    vector = recommender.interests.read([request], recommender.state)[0].vector
    assert vector is not None
    rest = " ".join(words[:1] + words[2:])
    texts = [artefact.texts[row], rest]
    with torch.no_grad():
        scores = artefact.ready(artefact.encode_texts(texts)) @ vector
    assert found.words[1].effect == pytest.approx(float(scores[0] - scores[1]), abs=1e-4)


@pytest.mark.parametrize("name", ["text_pooled", "side_id_pooled"])
def test_words_by_gradients_add_up(artefact_of: Artefacts, name: str) -> None:
    pytest.importorskip("captum", reason="the extra explain is not installed")
    recommender = Recommender.load(artefact_of(name))
    artefact = recommender.artefact
    row = max(range(1, len(artefact.ids)), key=lambda row: len(artefact.texts[row].split()))
    request = Request(history=artefact.ids[1:3])
    found = recommender.explain(request, artefact.ids[row], words="gradients")
    assert [word.text for word in found.words] == artefact.texts[row].split()
    encoder = artefact.item_tower.encoder
    ids = encoder.tokenizer(artefact.texts[row], truncation=True, max_length=encoder.max_tokens, return_tensors="pt")
    special = torch.isin(
        ids["input_ids"], torch.tensor([encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id])
    )
    blank = ids["input_ids"].masked_fill(~special, encoder.pad_id)
    vector = recommender.interests.read([request], recommender.state)[0].vector
    with torch.no_grad():
        both = encoder(torch.cat([ids["input_ids"], blank]), layers=name == "side_id_pooled")
        scores = artefact.ready(artefact.item_tower.from_features(both)) @ vector
    total = sum(word.effect for word in found.words)
    assert total == pytest.approx(float(scores[0] - scores[1]), abs=0.02, rel=0.03), "a sum of 32 steps"


def test_words_need_a_text_tower(artefact_of: Artefacts) -> None:
    recommender = Recommender.load(artefact_of("id_sequence"))
    ids = recommender.artefact.ids
    with pytest.raises(RequestError) as caught:
        recommender.explain(Request(history=ids[1:2]), ids[3], words="occlusion")
    assert caught.value.code == "no_text_tower"


def test_sentences_can_be_replaced() -> None:
    reasons = [Reason("a", "Alpha", 2.0, 0), Reason("b", "Beta", -1.5, 1), Reason("c", "Gamma", 1.0, 2)]
    own = Sentences(history="{item} <- {reasons}", joiner=" + ", most=2)
    assert own.say("X", "towers", reasons, 3) == "X <- “Alpha” + “Gamma”"
    assert Sentences().say("X", "towers", reasons[1:2], 3) == Sentences().no_reason.format(item="X")
    assert "1,234" in Sentences().say("X", "popularity", [], 1234)


def test_html_is_escaped_and_shaded() -> None:
    found = Explanation(
        "i", "<b>", 1.0, [Reason("a", "<script>", 0.5, 0)], [Word("<i>", 1.0), Word("low", -2.0)], "a & b"
    )
    html = to_html(found)
    assert "<script>" not in html
    assert "<i>" not in html
    assert "&lt;script&gt;" in html
    assert "a &amp; b" in html
    assert "rgba(196, 60, 60, 0.60)" in html
    assert "rgba(34, 139, 84, 0.30)" in html
