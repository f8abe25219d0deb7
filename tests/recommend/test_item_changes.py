"""A catalogue is what the artefact and the changes of its items make of it, by whatever steps it hears of them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_rec.recommend import Event, Recommender, Request, RequestError
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.export import export
from lightning_rec.recommend.item_changes import ItemChange, additions, removals, updates

Artefacts = Callable[[str], Path]


def test_several_changes_in_one() -> None:
    added = ItemChange("a", {"title": "x", "brand": "b"}, added=5, place=(1, 0))
    updated = ItemChange("a", {"title": "y", "size": None}).after(added)
    assert updated == ItemChange("a", {"title": "y", "brand": "b", "size": None}, added=5, place=(1, 0))
    removed = ItemChange("a", removed=True).after(updated)
    assert removed == ItemChange("a", {"title": "y", "brand": "b", "size": None}, True, 5, False, (1, 0))
    again = ItemChange("a", {"brand": "c"}, added=9, place=(4, 2)).after(removed)
    assert again == ItemChange("a", {"brand": "c"}, added=9, anew=True, place=(1, 0))
    assert ItemChange("a", {"title": "z"}).after(again).anew, "what the artefact has stays away"
    for change in (added, updated, removed, again, ItemChange("a")):
        assert ItemChange.from_json("a", change.to_json()) == change
    assert ItemChange("a", removed=True).to_json() == '{"removed":true}'
    assert ItemChange.from_json("a", '{"removed":true,"of_a_later_version":1}') == ItemChange("a", removed=True)


@pytest.fixture(scope="module")
def fresh(run_of, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    """Text and id vectors, and items that live for some days."""
    folder = tmp_path_factory.mktemp("changes") / "artefact"
    export(run_of("text_id_gate", {"max_history: 8": "max_history: 8\n    max_age: 1440"}), folder, progress=False)
    return folder


def _same(one: Recommender, other: Recommender) -> None:
    a, b = one.state, other.state
    assert a.ids == b.ids
    assert a.rows == b.rows
    assert a.texts == b.texts
    assert a.display == b.display
    for name in {*a.attributes, *b.attributes}:
        nothing = [None] * len(a)
        assert list(a.attributes.get(name, nothing)) == list(b.attributes.get(name, nothing)), name
    assert torch.equal(a.alive, b.alive)
    assert a.lives is not None
    assert b.lives is not None
    assert torch.equal(a.lives.born, b.lives.born)
    assert torch.equal(a.lives.dies, b.lives.dies)
    torch.testing.assert_close(a.raw, b.raw, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a.ready, b.ready, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_step_by_step_at_once_and_twice_it_is_the_same_catalogue(fresh: Path, seed: int) -> None:
    draw = random.Random(seed)
    artefact = Artefact.read(fresh)
    now = int(artefact.lives.born[1:].max())  # type: ignore[union-attr]  # it has lives
    steps, skips = Recommender(artefact, now=now), Recommender(artefact, now=now)
    notes: dict[str, ItemChange] = {}
    known = artefact.ids[1:6]
    titles = ["red shoe", "green tea", *(artefact.attributes["title"][row] for row in range(1, 4))]

    def apply(recommender: Recommender, items: list[str]) -> None:
        chosen = sorted((notes[item] for item in items), key=lambda note: note.place or (0, 0))
        recommender.change_items(lambda state: chosen)

    late: dict[str, None] = {}  # what ``skips`` has not heard of
    for number in range(1, 30):
        state = steps.state
        kind = draw.choice(["add", "add", "update", "update", "remove"])
        fields: dict[str, object] = {"title": draw.choice(titles)}
        if draw.random() < 0.4:
            fields["published"] = draw.choice([str(now - 3600), "", now + 7200])
        if draw.random() < 0.4:
            fields[draw.choice(["colour", "categories"])] = draw.choice(["blue", ["tea", "lamp"], None])
        there = [id_ for id_ in [*known, "n0", "n1", "n2", "n3"] if state.living([id_])[0]]
        away = [id_ for id_ in [*known, "n0", "n1", "n2", "n3"] if id_ not in there]
        item = draw.choice((away if kind == "add" else there) or ["none"])
        if item == "none":
            continue
        if kind == "add":
            changes = additions(state, [{"item_id": item, **fields}], now + number)
            changes = [ItemChange(c.item, c.fields, c.removed, c.added, c.anew, (number, 0)) for c in changes]
        elif kind == "update":
            changes = updates(state, [{"item_id": item, **fields}])
        else:
            changes = removals(state, [item])
        notes[item] = changes[0].after(notes.get(item))
        late[item] = None
        apply(steps, [item])
        if draw.random() < 0.2:
            apply(skips, list(late))
            late.clear()
            _same(steps, skips)
    restarted = Recommender(artefact, now=now)
    apply(restarted, list(notes))
    _same(steps, restarted)
    apply(restarted, list(notes))  # once more
    _same(steps, restarted)
    user = artefact.users.sample(1)[0]  # type: ignore[union-attr]  # it has users
    asked = [
        Request(user=user, k=100, filter_seen=False),
        Request(history=[*known[:2], "n0", "n1"], k=100),
        Request(k=100),
    ]
    if "categories" in restarted.state.attributes:
        asked.append(Request(user=user, k=100, where={"categories": "tea"}))
    for one, other in zip(steps.recommend(asked, now + 100), restarted.recommend(asked, now + 100), strict=True):
        assert {item.id for item in one.items} == {item.id for item in other.items}
        scores = [[item.score for item in answer.items] for answer in (one, other)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-5, abs=1e-5)


def test_an_artefact_that_has_an_added_item_already(artefact_of: Artefacts) -> None:
    """Its other fields stay; an item that is gone from it is refused, and one that was removed is not missed."""
    recommender = Recommender.load(artefact_of("text_pooled"))
    had = recommender.artefact.ids[1]
    before = recommender.item(had)
    recommender.change_items(lambda state: [ItemChange(had, {"brand": "new"}, added=5, place=(1, 0))])
    assert recommender.item(had) == before | {"brand": "new"}
    assert recommender.state.rows[had] == 1
    recommender.change_items(lambda state: [ItemChange("gone", {"title": "x"}, removed=True)])
    assert "gone" not in recommender.state.rows
    generation = recommender.generation
    with pytest.raises(RequestError, match=r"no item with the id 'gone'"):
        recommender.change_items(lambda state: [ItemChange("new", {}, added=1), ItemChange("gone", {"title": "x"})])
    assert recommender.generation == generation
    assert "new" not in recommender.state.rows


def test_an_old_text_has_its_old_vector(artefact_of: Artefacts) -> None:
    """Also where it is made of an id vector, which no text tells."""
    shop = Recommender.load(artefact_of("text_id_gate"))
    raw, title, id_ = shop.state.raw, shop.artefact.attributes["title"][1], shop.artefact.ids[1]
    shop.update_items([{"item_id": id_, "title": "something else"}])
    assert not torch.equal(shop.state.raw[1], raw[1])
    shop.update_items([{"item_id": id_, "title": title}])
    assert torch.equal(shop.state.raw, raw)
    assert torch.equal(shop.state.ready, shop.artefact.vectors)


def test_a_removal_encodes_and_copies_nothing(artefact_of: Artefacts, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Recommender.load(artefact_of("text_pooled"))
    shop.add_items([{"item_id": "a", "title": "x"}])
    monkeypatch.setattr(Artefact, "encode_texts", None)
    before = shop.state
    shop.remove_items(["a", shop.artefact.ids[1]])
    assert shop.state.ready is before.ready
    assert shop.state.index.preparation is before.index.preparation  # type: ignore[attr-defined]  # it is exact
    assert shop.state.texts is before.texts


def test_each_text_is_encoded_once_and_others_go_on_meanwhile(
    artefact_of: Artefacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While texts are encoded, readers, events and other changes wait for nothing."""
    shop = Recommender.load(artefact_of("text_pooled"))
    shop.artefact.encode_texts(["warm"])
    encode, texts, began, leave = shop.artefact.encode_texts, [], threading.Event(), threading.Event()

    def slow(some: list[str]) -> torch.Tensor:
        texts.append(len(some))
        began.set()
        assert leave.wait(10)
        return encode(some)

    monkeypatch.setattr(shop.artefact, "encode_texts", slow)
    rows = [{"item_id": f"new{n}", "title": f"thing {n % 40}"} for n in range(100)]
    adding = threading.Thread(target=shop.add_items, args=(rows,))
    adding.start()
    assert began.wait(10)
    shop.remove_items([shop.artefact.ids[1]])
    assert shop.update("someone", [Event(shop.artefact.ids[2], 1)]) == 1
    assert shop.recommend(Request(user="someone", k=3)).path == "towers"
    assert shop.n_items == len(shop.artefact.ids) - 2
    leave.set()
    adding.join()
    assert shop.n_items == len(shop.artefact.ids) - 2 + 100
    assert texts == [32, 8], "40 texts, in parts between which others get the language model"


def test_what_cannot_be_recorded_does_not_happen(artefact_of: Artefacts) -> None:
    shop = Recommender.load(artefact_of("text_pooled"))
    state, told = shop.state, []

    def away(changes: object) -> None:
        told.append((changes, shop.state is state))
        raise OSError("away")

    with pytest.raises(OSError, match=r"away"):
        shop.change_items(lambda state: additions(state, [{"item_id": "a", "title": "x"}], 3), away)
    assert told == [([ItemChange("a", {"title": "x"}, added=3)], True)]
    assert shop.state is state
    with pytest.raises(RequestError):
        shop.change_items(lambda state: removals(state, ["b"]), away)
    assert len(told) == 1, "what is refused is not recorded"
