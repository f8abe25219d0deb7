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
    for change in (added, updated, removed, again, ItemChange("a"), ItemChange("a", added=0, anew=True)):
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
    """The same items, and the same of each; of removed ones nothing is compared."""
    a, b = one.state, other.state
    ids = sorted(id_ for id_, row in a.rows.items() if a.alive[row])
    assert ids == sorted(id_ for id_, row in b.rows.items() if b.alive[row])
    x, y = (torch.tensor([state.rows[id_] for id_ in ids]) for state in (a, b))
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    for name in {*a.attributes, *b.attributes}:
        left, right = (state.attributes.get(name, [None] * len(state)) for state in (a, b))
        assert [left[row] for row, _ in pairs] == [right[row] for _, row in pairs], name
    for row, same in pairs:
        assert (a.texts[row], a.display[row]) == (b.texts[same], b.display[same])
    assert a.lives is not None
    assert b.lives is not None
    assert torch.equal(a.lives.born[x], b.lives.born[y])
    assert torch.equal(a.lives.dies[x], b.lives.dies[y])
    torch.testing.assert_close(a.raw[x], b.raw[y], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a.ready[x], b.ready[y], atol=1e-5, rtol=1e-5)


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
            fields["published"] = draw.choice([str(now - 3600), "", now + 7200, "11/12/2019", "25/12/2019", "20191112"])
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
    away = {id_ for id_, note in notes.items() if note.removed}
    assert not away & set(restarted.state.ids[len(artefact.ids) :]), "what came and went has no row"
    history = [id_ for id_ in [*known, "n0", "n1", artefact.ids[8]] if id_ in restarted.state.rows and id_ not in away]
    asked = [Request(history=history, k=100, filter_seen=False), Request(history=history[-2:], k=100), Request(k=100)]
    if "categories" in restarted.state.attributes:
        asked.append(Request(history=history, k=100, where={"categories": "tea"}))
    for one, other in zip(steps.recommend(asked, now + 100), restarted.recommend(asked, now + 100), strict=True):
        assert {item.id for item in one.items} == {item.id for item in other.items}
        scores = [[item.score for item in answer.items] for answer in (one, other)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-5, abs=1e-5)


def test_an_artefact_that_has_an_added_item_already(artefact_of: Artefacts) -> None:
    """Its other fields stay; what it lacks, and nobody added, is not missed."""
    recommender = Recommender.load(artefact_of("text_pooled"))
    had = recommender.artefact.ids[1]
    before = recommender.item(had)
    recommender.change_items(lambda state: [ItemChange(had, {"brand": "new"}, added=5, place=(1, 0))])
    assert recommender.item(had) == before | {"brand": "new"}
    assert recommender.state.rows[had] == 1
    gone = [ItemChange("gone", {"title": "x"}, removed=True), ItemChange("updated", {"title": "x"})]
    recommender.change_items(lambda state: [*gone, ItemChange("new", {}, added=0)])
    assert list(recommender.state.ids[-2:]) == [recommender.artefact.ids[-1], "new"]
    with pytest.raises(RequestError, match=r"no item with the id 'gone'"):
        recommender.change_items(lambda state: updates(state, [{"item_id": "gone", "title": "x"}]))


def test_a_removal_needs_none_of_the_fields(artefact_of: Artefacts, fresh: Path) -> None:
    """Nor does it matter that the artefact refuses them; an item that came and went has no row."""
    shop = Recommender.load(artefact_of("matrix_factorisation"))
    id_ = shop.artefact.ids[1]
    raw = shop.state.raw
    fields = {"title": "x", "published": "yesterday"}
    notes = [ItemChange(id_, fields, True, 7, True, (1, 0)), ItemChange("new", fields, True, 8, False, (2, 0))]
    shop.change_items(lambda state: notes)
    assert not shop.state.living([id_])[0]
    assert shop.state.raw is raw
    assert "new" not in shop.state.rows
    artefact = Artefact.read(fresh)
    news = Recommender(artefact, now=int(artefact.lives.born[1]))  # type: ignore[union-attr]  # it has lives
    id_ = artefact.ids[1]
    born = news.state.lives.born  # type: ignore[union-attr]  # it has lives
    news.change_items(lambda state: [ItemChange(id_, fields, removed=True)])
    assert not news.state.living([id_])[0]
    assert torch.equal(news.state.lives.born, born)  # type: ignore[union-attr]
    news.add_items([{"item_id": id_, "published": 1_600_000_000}])
    assert news.state.lives.born[1] == 1_600_000_000  # type: ignore[union-attr]


def test_a_history_that_holds_what_came_and_went(artefact_of: Artefacts) -> None:
    """It is read with the item where that was known, and passes over it after a restart."""
    here = Recommender.load(artefact_of("text_pooled"))
    here.add_items([{"item_id": "a", "title": "a lamp"}])
    vector = here.recommend(Request(history=["a"], k=3))
    here.remove_items(["a"])
    assert [item.id for item in here.recommend(Request(history=["a"], k=3)).items] == [i.id for i in vector.items]
    there = Recommender(here.artefact)
    there.change_items(lambda state: [ItemChange("a", {"title": "a lamp"}, removed=True, added=5)])
    known = here.artefact.ids[3]
    passed, plain = there.recommend([Request(history=["a", known]), Request(history=[known])])
    assert passed.items == plain.items
    assert there.recommend(Request(history=["a"])).path == "popularity"


def test_refused_changes_leave_nothing_and_keep_no_other_away(artefact_of: Artefacts, fresh: Path) -> None:
    artefact = Artefact.read(fresh)
    news = Recommender(artefact, now=int(artefact.lives.born[1]))  # type: ignore[union-attr]  # it has lives
    refused = {"of an earlier try": RequestError("", "", "")}
    one, two, three = news.artefact.ids[1:4]
    before = {id_: news.item(id_) for id_ in (one, two)}
    notes = [
        ItemChange(one, {"title": "x", "published": "yesterday"}),
        ItemChange("new", {"title": "x", "published": "9999-12-31"}, added=5, place=(1, 0)),
        ItemChange(two, {"published": "0001-01-01"}, added=6, anew=True, place=(2, 0)),
        ItemChange(three, {"title": "y", "published": "2019-12-31"}),
    ]
    with pytest.raises(RequestError, match=r"'yesterday' is no timestamp"):
        news.change_items(lambda state: notes)
    news.change_items(lambda state: notes, refused=refused)
    assert {id_: error.code for id_, error in refused.items()} == dict.fromkeys([one, "new", two], "bad_published")
    assert "'9999-12-31' is no timestamp" in str(refused["new"])
    assert {id_: news.item(id_) for id_ in before} == before
    assert list(news.state.ids) == list(news.artefact.ids)
    assert news.item(three)["title"] == "y"
    assert torch.equal(news.state.raw[1:3], news.artefact.raw_vectors[1:3])
    shop = Recommender.load(artefact_of("matrix_factorisation"))
    many = [ItemChange(f"n{n}", {"title": f"thing {n}"}, added=5, place=(1, n)) for n in range(3000)]
    shop.change_items(lambda state: [*many, ItemChange(shop.artefact.ids[2], removed=True)], refused=refused)
    assert len(refused) == 3000
    assert {error.code for error in refused.values()} == {"no_text_tower"}
    assert shop.n_items == len(shop.artefact.ids) - 2


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
