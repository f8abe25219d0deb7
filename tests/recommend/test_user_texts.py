"""A recommender makes the text of a user as the run did: the same cleaning, the same titles, the same events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from lightning_rec.data.batch import UserBatch
from lightning_rec.recommend import Event, Request
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.export import _template, export
from lightning_rec.recommend.fitted import Fitted, open_run
from lightning_rec.recommend.recommender import Recommender

ITEMS = [
    ("i1", "Tom &amp; JERRY", "Mice."),
    ("i2", "", "A <b>Red</b> shoe " + "of leather " * 9),
    ("i3", "", ""),
    ("i4", "  Green TEA", ""),
    ("i5", "Black tea", "Hot."),
]
#: What the cleaning ``[whitespace, lower]`` makes of them; the second is cut at 80 characters, between words.
TITLES = {
    "i1": "tom &amp; jerry",
    "i2": "a <b>red</b> shoe of leather of leather of leather of leather of leather of",
    "i3": "",
    "i4": "green tea",
    "i5": "black tea",
}
#: Newest last; the last one is the test target. The event of ``a`` before it is with an item without any text.
LOG = {"a": ["i4", "i1", "i2", "i3", "i5"], "b": ["i5", "i4", "i3", "i2", "i1"], "c": ["i1", "i3", "i5", "i2", "i4"]}


@pytest.fixture(scope="module")
def checkpoint(run_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose users' texts have the titles of three events, though its towers read histories of two."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [f'{id_},"{title}","{text}"' for id_, title, text in ITEMS]
    (folder / "items.csv").write_text("\n".join(["item_id,title,description", *rows, ""]))
    events = [
        f"{user},{item},5,{1_600_000_000 + place},It&#39;s {item.upper()}"
        for user, items in LOG.items()
        for place, item in enumerate(items)
    ]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,rating,timestamp,review", *events, ""]))
    (folder / "users.csv").write_text("user_id,city,age\na,Malm&ouml;  S,20\nb,Turku,\nc,,22\n")
    changes = {
        "SHOP/interactions.csv": str(folder / "log.csv"),
        "SHOP/items.csv": str(folder / "items.csv"),
        "SHOP/users.csv": str(folder / "users.csv"),
        "max_history: 8": 'max_history: 2\n    user_titles: 3\n    template: "{description}"\n'
        "    cleaning: [whitespace, lower]",
    }
    return run_of("language_user", changes)


@pytest.fixture(scope="module")
def fitted(checkpoint: Path) -> Fitted:
    return open_run(checkpoint)


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact") / "texts"
    export(checkpoint, folder, progress=False)
    return folder


@pytest.fixture
def recommender(folder: Path) -> Recommender:
    return Recommender.load(folder)


def texts_of(recommender: Recommender, *requests: Request) -> list[str]:
    """The texts that the user tower is given for some requests."""
    seen: list[str] = []
    plain = recommender.artefact.interests

    def interests(users: UserBatch, items: torch.Tensor | None = None) -> torch.Tensor:
        assert users.texts is not None
        seen.extend(users.texts)
        return plain(users, items)

    recommender.artefact.interests = interests  # type: ignore[method-assign]
    try:
        recommender.interests.read(requests, recommender.state)
    finally:
        recommender.artefact.interests = plain  # type: ignore[method-assign]
    return seen


def test_training_and_answers_give_the_tower_the_same_text(fitted: Fitted, recommender: Recommender) -> None:
    tested: dict[str, str] = {}
    interests = {}
    with torch.no_grad():
        raw = fitted.module.encode_catalogue()
        for batch in fitted.data.test_dataloader():
            users = [fitted.data.user_ids[row] for row in batch.users.users.tolist()]
            tested |= dict(zip(users, batch.users.texts, strict=True))
            vectors = fitted.module.score.interest(fitted.module.user_tower(batch.users, raw))[:, -1]
            interests |= dict(zip(users, vectors, strict=True))
    # of the three events before the last one, the newest first; i3 is one of them and says nothing
    assert tested["a"].startswith(f"malm&ouml; s, 20. Likes {TITLES['i2']}, {TITLES['i1']}. Says: it&#39;s i3 ")
    assert tested["b"].startswith(f"turku, Likes {TITLES['i2']}, green tea. Says: ")
    assert tested["c"].startswith(f"22. Likes {TITLES['i2']}, black tea. Says: ")

    # an artefact knows the reviews of the whole log: profile and titles alone are compared
    requests = [Request(user=user, history=items[:-1]) for user, items in LOG.items()]
    told = texts_of(recommender, *requests)
    assert [text.split(" Says")[0] for text in told] == [tested[user].split(" Says")[0] for user in LOG]
    # without a profile; the vector of a text is the same in the run and in the artefact
    nobody = Request(history=LOG["a"][:-1])
    assert texts_of(recommender, nobody) == [f"Likes {TITLES['i2']}, {TITLES['i1']}"]
    with torch.no_grad():
        given = recommender.artefact.interests(_batch(tested["a"]))[0, -1]
    torch.testing.assert_close(given, interests["a"].float(), atol=1e-5, rtol=0)


def _batch(text: str) -> UserBatch:
    return UserBatch(torch.tensor([[1]]), torch.tensor([1]), torch.tensor([0]), torch.zeros(1, 1).long(), [text])


def test_a_user_of_the_fitted_data_and_one_of_the_store(fitted: Fitted, recommender: Recommender) -> None:
    data = fitted.data
    assert data.user_texts is not None
    rows = [data.user_ids.index(user) for user in LOG]
    ends = data.histories.indptr[[row + 1 for row in rows]]
    whole = data.user_texts(torch.tensor(rows).numpy(), ends)
    assert texts_of(recommender, *(Request(user=user) for user in LOG)) == whole
    assert whole[0].startswith(f"malm&ouml; s, 20. Likes black tea, {TITLES['i2']}. Says: it&#39;s i5 it&#39;s i3 ")
    recommender.update("new", [Event("i1", 1), Event("unknown", 2), Event("i3", 3), Event("i4", 4)])
    assert texts_of(recommender, Request(user="new")) == ["Likes green tea, tom &amp; jerry"]
    # only an item that says nothing: the template skips the titles as in training
    assert texts_of(recommender, Request(history=["i3"])) == [""]


def test_items_that_are_added_or_changed(recommender: Recommender) -> None:
    recommender.add_items(
        [
            {"item_id": "n1", "title": "BIG &lt; Small\n", "description": "Long."},
            {"item_id": "n2", "description": "Only  A text"},
            {"item_id": "n3", "title": "   "},
            {"item_id": "n4", "name": "A Name"},
        ]
    )
    named = {"n1": "Likes big &lt; small", "n2": "Likes only a text", "n3": "", "n4": "Likes a name"}
    assert texts_of(recommender, *(Request(history=[id_]) for id_ in named)) == list(named.values())
    three = texts_of(recommender, Request(history=["i4", "n2", "n1"]))
    assert three == ["Likes big &lt; small, only a text, green tea"]
    recommender.update_items([{"item_id": "i3", "title": "At LAST"}, {"item_id": "i1", "title": None}])
    assert texts_of(recommender, Request(history=["i1", "i3"])) == ["Likes at last, mice."]
    # people read on what they always did
    assert recommender.item("n3")["text"] == "n3"
    assert recommender.item("n1")["text"] == "BIG &lt; Small"
    assert recommender.item("i2")["text"].endswith("…")


def test_words_are_cleaned_as_the_texts_of_the_run(recommender: Recommender) -> None:
    assert texts_of(recommender, Request(text=" Green \t TEA &amp; ")) == ["green tea &amp;"]
    one, other = recommender.recommend([Request(text="GREEN tea"), Request(text="green  TEA")])
    assert one.path == "text"
    assert one.items == other.items
    # nothing is left of it: as if nothing had been said
    assert recommender.recommend(Request(text=" \t ")).path == "popularity"


def test_effects_are_those_of_the_text(recommender: Recommender) -> None:
    """The tower reads three titles, so that the third newest event has a reason, and one that says nothing has none."""
    request = Request(history=["i1", "i5", "i3", "i4"])
    found = recommender.explain(request, "i2")
    assert {reason.id: reason.place for reason in found.reasons} == {"i5": 0, "i3": 1, "i4": 2}
    for reason in found.reasons:
        rest = [id_ for id_ in request.history or () if id_ != reason.id]
        assert found.score - reason.effect == pytest.approx(float(recommender.score(Request(history=rest), ["i2"])[0]))
    short = recommender.explain(Request(history=["i3", "i4"]), "i2")
    assert {reason.id: reason.effect for reason in short.reasons}["i3"] == pytest.approx(0, abs=1e-6)


def test_no_titles_are_wanted(recommender: Recommender) -> None:
    recommender.interests._titles = 0
    assert texts_of(recommender, Request(history=["i1", "i4"])) == [""]


def test_lone_surrogates_reach_no_language_model(artefact_of: Callable[[str], Path]) -> None:
    recommender = Recommender.load(artefact_of("language_user"))
    recommender.add_items([{"item_id": "half", "title": "Half \ud83d a smile", "description": "\udc00"}])
    assert texts_of(recommender, Request(history=["half"])) == ["Likes Half a smile"]
    assert texts_of(recommender, Request(text="no \ud83d smile")) == ["no smile"]
    assert recommender.recommend(Request(history=["half"])).path == "towers"


def test_titles_are_made_only_where_a_tower_reads_them(artefact_of: Callable[[str], Path], monkeypatch) -> None:
    monkeypatch.setattr(Artefact, "item_title", None)
    recommender = Recommender.load(artefact_of("text_pooled"))
    assert recommender.recommend(Request(history=recommender.artefact.ids[1:3])).path == "towers"


def test_without_a_template_times_of_publication_are_no_text_of_new_items() -> None:
    table = Dataset.from_dict({"item_id": ["a"], "title": ["A"], "published": ["1600000000"], "brand": ["B"]})
    data = SimpleNamespace(default_template=None, template=None, catalogue=SimpleNamespace(table=table))
    assert _template(SimpleNamespace(data=data)) == "{title}. {brand}"  # type: ignore[arg-type]
