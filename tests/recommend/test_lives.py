"""Answers hold what is alive when they are given, in a run whose candidates are (``max_age``)."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lightning_rec.cli import main
from lightning_rec.data.freshness import NEVER, Lifetimes
from lightning_rec.recommend.ann import make_index
from lightning_rec.recommend.artefact import ITEMS, Artefact
from lightning_rec.recommend.export import export
from lightning_rec.recommend.fitted import open_run
from lightning_rec.recommend.index import ExactIndex, Index
from lightning_rec.recommend.lives import Lives, publications, publications_or_errors
from lightning_rec.recommend.lives import moment as written_moment
from lightning_rec.recommend.recommender import Recommender
from lightning_rec.recommend.types import Request, RequestError

HOUR = 3600
# the shop's events span months: a run in which an item is a candidate for 60 days after its first event
SHOP_DAYS = {"max_history: 8": "max_history: 8\n    max_age: 1440"}


@pytest.fixture(scope="session")
def fresh(run_of, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint and its artefact."""
    checkpoint = run_of("text_pooled", SHOP_DAYS)
    folder = tmp_path_factory.mktemp("lives") / "artefact"
    export(checkpoint, folder, progress=False)
    return checkpoint, folder


def lives_of(born: list[int], hours: float) -> Lives:
    made = Lifetimes.of(np.array([NEVER, *born], dtype=np.int64), hours)
    return Lives(torch.from_numpy(made.born), torch.from_numpy(made.dies), hours)


def living(artefact: Artefact, moment: int) -> set[str]:
    """By a loop."""
    born, dies = artefact.lives.born.tolist(), artefact.lives.dies.tolist()
    return {id_ for row, id_ in enumerate(artefact.ids) if row and born[row] <= moment <= dies[row]}


def test_the_lives_are_those_of_the_run(fresh):
    checkpoint, folder = fresh
    lifetimes = open_run(checkpoint).data.lifetimes
    artefact = Artefact.read(folder)
    assert torch.equal(artefact.lives.born, torch.from_numpy(lifetimes.born))
    assert torch.equal(artefact.lives.dies, torch.from_numpy(lifetimes.dies))
    assert artefact.lives.max_age == 1440
    assert artefact.manifest.parts["lives"] == {"kind": "lives", "max_age": 1440.0}


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_an_item_comes_while_it_lives_and_never_else(fresh, index):
    if index != "exact":
        pytest.importorskip("faiss", reason="the extra `index` is not installed")
    artefact = Artefact.read(fresh[1])
    first = int(artefact.lives.born[1:].min())
    last = int(artefact.lives.born[1:].max())
    recommender = Recommender(artefact, make_index(index), now=last)
    user = artefact.users.sample(1)[0]
    asked = [
        Request(user=user, k=100, filter_seen=False),
        Request(text="green tea", k=100),
        Request(k=100),  # nobody: popularity
        Request(user=user, k=100, filter_seen=False, diversity=0.3),
        Request(user=user, k=100, filter_seen=False, candidates=artefact.ids[1:]),
        Request(k=100, at_most={"categories": 100}),
        Request(user=user, k=100, filter_seen=False, explore="ucb"),
    ]
    sizes = set()
    for moment in (first - 1, first, first + 40 * 24 * HOUR, last, last + 30 * 24 * HOUR, last + 61 * 24 * HOUR):
        wanted = living(artefact, moment)
        sizes.add(len(wanted))
        for request, answer in zip(asked, recommender.recommend(asked, now=moment), strict=True):
            assert {item.id for item in answer.items} == wanted, request
            assert answer.unknown == [], "an item that is not alive is not unknown"
    assert {0, 1} < sizes
    assert max(sizes) > 5
    assert {item.id for item in recommender.recommend(asked[0]).items} == living(artefact, last), (
        "the recommender's now"
    )
    assert recommender.score(asked[0], [artefact.ids[1]]).shape == (1,), "what has died can still be explained"


def test_the_clock_is_that_of_today_unless_a_moment_is_given(fresh, monkeypatch):
    with pytest.warns(UserWarning, match=r"No item of .* is alive: each lives for 1440 hours"):
        recommender = Recommender.load(fresh[1])
    assert recommender.recommend(Request(k=5)).items == []
    moment = int(recommender.artefact.lives.born[1])
    monkeypatch.setattr(time, "time", lambda: moment + 0.5)
    assert recommender.artefact.ids[1] in {item.id for item in recommender.recommend(Request(k=50)).items}


def test_new_items_live_from_their_publication_or_from_now(fresh):
    artefact = Artefact.read(fresh[1])
    now, old = int(artefact.lives.born[1:].max()), artefact.ids[1]
    life, start = 1440 * HOUR, int(artefact.lives.born[1])
    recommender = Recommender(artefact, now=now)

    def found(moment: int) -> set[str]:
        return {item.id for item in recommender.recommend(Request(k=100), now=moment).items}

    recommender.add_items(
        [
            {"item_id": "today", "title": "Black tea"},
            {"item_id": "before", "title": "White tea", "published": str(now - life // 2)},
            {"item_id": "later", "title": "Red tea", "published": "2099-01-02 00:00:00"},
        ]
    )
    assert {"today", "before", "later"} & found(now) == {"today", "before"}
    assert {"today", "before", "later"} & found(now - 1) == {"before"}
    assert {"today", "before", "later"} & found(now + life) == {"today"}
    assert {"today", "before", "later"} & found(4_070_995_200) == {"later"}
    recommender.update_items([{"item_id": "today", "title": "Blacker tea"}])  # says nothing of its birth
    assert "today" not in found(now - 1)
    recommender.update_items([{"item_id": "later", "published": now}])
    assert "later" in found(now)
    recommender.now = start + life + 1
    assert old not in found(recommender.now)
    recommender.remove_items([old])
    recommender.add_items([{"item_id": old}])
    assert old in found(recommender.now), "what comes again lives again"
    with pytest.raises(RequestError, match=r"'bad' has a published time that cannot be used") as caught:
        recommender.add_items([{"item_id": "bad", "published": "soon"}])
    assert caught.value.code == "bad_published"
    assert "bad" not in recommender.state.rows


def test_without_max_age_nothing_changes(artefact_of):
    folder = artefact_of("text_pooled")
    names = pq.read_table(folder / ITEMS).column_names
    assert not {"born", "dies"} & set(names)
    recommender = Recommender.load(folder, now=1)
    assert recommender.artefact.lives is None
    assert recommender.state.at(5) is recommender.state
    assert len(recommender.recommend(Request(k=100)).items) == recommender.n_items


def test_spans_are_those_in_which_the_same_rows_live():
    lives = lives_of([10, 20, 20, 7200], hours=1)
    moments = [0, 9, 10, 11, 19, 20, 3610, 3611, 3620, 3621, 7199, 7200, 10_800, 10_801, 10**12]
    for moment in moments:
        start, end = lives.span(moment)
        assert start <= moment < end
        for other in range(max(start, -5), min(end, 11_000), 7):
            assert torch.equal(lives.at(other), lives.at(moment))
        for outside in (start - 1, end):
            if -(10**15) < outside < 10**15:
                assert not torch.equal(lives.at(outside), lives.at(moment))
    endless = lives_of([10], hours=math.inf)
    assert endless.span(5)[1] == 10
    assert endless.at(10**15).tolist() == [False, True]
    assert endless.with_born({2: 50}, 3).at(60).tolist() == [False, True, True]


def test_a_state_is_made_once_for_a_span(fresh):
    recommender = Recommender.load(fresh[1], now=(moment := int(Artefact.read(fresh[1]).lives.born[1])))
    state = recommender.state.at(moment)
    assert recommender.state.at(state.lives.span(moment)[1] - 1) is state
    assert recommender.state.at(state.lives.span(moment)[1]) is not state
    assert state.last_layer is recommender.state.last_layer
    assert state.generation == recommender.generation


def test_publications():
    fields = [{"published": ["2020-01-01 00:00:00"]}, {}, {"published": ""}, {"published": math.nan}]
    assert publications(fields) == [1_577_836_800, None, None, None]
    assert publications([{"published": 1.6e9}, {"published": "2020-01-01"}]) == [1_600_000_000, 1_577_836_800]


def test_a_publication_reads_the_same_whatever_stands_beside_it():
    texts = ["11/12/2019", "25/12/2019", "20191112", "1573516800", "99999999999", "1573516800000", "5", "2019-11-12"]
    texts += ["2019-11-12T01:00+01:00", "12.11.2019", "12 Nov 2019", 1573516800.0, ["2019-11-12T00:00:00Z"], "2019-1-2"]
    alone = [publications([{"published": text}])[0] for text in texts]
    assert alone[:4] == [1_573_516_800, 1_577_232_000, 1_573_516_800, 1_573_516_800]
    told = [{"published": text} for text in texts]
    assert publications(told) == alone
    assert publications(told[::-1]) == alone[::-1]
    assert publications(told[:3] * 40 + told) == alone[:3] * 40 + alone


@pytest.mark.parametrize("text", ["9999-12-31", "0001-01-01", "31.12.9999", "2019-13-45", "1e300", "soon"])
def test_a_publication_that_cannot_be_used(text):
    beside = [{"published": "2019-11-12"}, {"published": 1_573_516_800}]
    with pytest.raises(RequestError, match=r"The item 'a' has a published time that cannot be used") as caught:
        publications([*beside, {"item_id": "a", "published": text}])
    assert caught.value.code == "bad_published"
    found = publications_or_errors([*beside, {"item_id": "a", "published": text}, *beside])
    assert [found[0], *found[3:]] == [1_573_516_800] * 3
    assert isinstance(found[2], RequestError)


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_a_limited_graph_answers_as_the_exact_index(share):
    pytest.importorskip("faiss", reason="the extra `index` is not installed")
    torch.manual_seed(0)
    vectors, interest = torch.randn(600, 8), torch.randn(20, 8)
    index: Index = make_index("hnsw", ef_search=600).build(vectors)
    dead = torch.rand(600) < share
    limited = index.limited(vectors, dead)
    assert isinstance(limited, ExactIndex) is (share > 0.5)
    wanted = ExactIndex(vectors, dead).search(interest, 10)
    torch.testing.assert_close(limited.search(interest, 10)[0], wanted[0])
    assert index.search(interest, 10)[0].max() >= wanted[0].max(), "the index itself is as it was"


def test_a_moment_on_the_command_line(fresh, tmp_path):
    assert written_moment(None) is None
    assert written_moment("2020-09-13T12:26:40Z") == 1600000000
    assert written_moment(1600000000) == written_moment("1600000000") == 1600000000
    with pytest.raises(ValueError, match=r"now is 'yesterday': give seconds since 1970"):
        written_moment("yesterday")
    _, folder = fresh
    first = int(Artefact.read(folder).lives.born[1])
    output = tmp_path / "answer.jsonl"
    for given, full in ((str(first), True), ("2100-01-01", False)):
        main(["recommend", str(folder), "--history", "[t01]", "--k", "3", "--now", given, "--output", str(output)])
        assert bool(json.loads(output.read_text())["items"]) == full
