"""The recommender answers every request, exactly, from one catalogue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_rec.data.batch import UserBatch
from lightning_rec.recommend import Event, Request, RequestError
from lightning_rec.recommend.item_changes import additions, removals
from lightning_rec.recommend.recommender import Recommender

Artefacts = Callable[[str], Path]


@pytest.fixture
def shop(artefact_of: Artefacts) -> Recommender:
    """Text and id vectors, so that no two items have one score."""
    return Recommender.load(artefact_of("text_id_gate"))


def _brute(recommender: Recommender, history: list[str], leave_out: set[str]) -> list[str]:
    artefact = recommender.artefact
    rows = [artefact.ids.index(id_) for id_ in history][-artefact.manifest.max_history :]
    users = UserBatch(torch.tensor([rows]), torch.tensor([len(rows)]), torch.tensor([0]))
    with torch.no_grad():
        steps = artefact.interests(users, artefact.raw_vectors)[0]
        scores = artefact.vectors @ steps[-1 if len(steps) == 1 else len(rows) - 1]
    order = [artefact.ids[row] for row in scores.argsort(descending=True).tolist() if row]
    return [id_ for id_ in order if id_ not in leave_out]


@pytest.mark.parametrize("config", ["text_id_gate", "id_sequence"])
def test_answers_are_a_full_ranking(artefact_of: Artefacts, config: str) -> None:
    recommender = Recommender.load(artefact_of(config))
    ids = recommender.artefact.ids[1:]
    for history in ([ids[0]], ids[:3], ids[3:8]):
        answer = recommender.recommend(Request(history=history, k=4, filter_seen=True))
        assert answer.path == "towers"
        assert [item.id for item in answer.items] == _brute(recommender, history, set(history))[:4]
        kept = recommender.recommend(Request(history=history, k=4, filter_seen=False))
        assert [item.id for item in kept.items] == _brute(recommender, history, set())[:4]


def test_batch_is_single(shop: Recommender) -> None:
    ids = shop.artefact.ids[1:]
    requests = [
        Request(history=ids[:2]),
        Request(history=[]),
        Request(text="a red shoe"),
        Request(user="nobody"),
        Request(history=ids[2:5], k=2, exclude=[ids[0]]),
        Request(history=ids[:3], candidates=ids[3:6], k=2),
        Request(history=["unknown", ids[1]]),
    ]
    together = shop.recommend(requests)
    for request, answer in zip(requests, together, strict=True):
        alone = shop.recommend(request)
        assert [item.id for item in alone.items] == [item.id for item in answer.items]
        assert alone.path == answer.path
        for mine, other in zip(alone.items, answer.items, strict=True):
            assert mine.score == pytest.approx(other.score, abs=1e-5)
    assert [answer.path for answer in together] == [
        "towers",
        "popularity",
        "text",
        "popularity",
        "towers",
        "towers",
        "towers",
    ]
    assert together[6].unknown == ["unknown"]


def test_popularity_is_by_training_counts(shop: Recommender) -> None:
    counts = dict(zip(shop.artefact.ids, shop.artefact.counts.tolist(), strict=True))
    answer = shop.recommend(Request(k=5))
    assert [item.score for item in answer.items] == sorted(counts.values(), reverse=True)[:5]
    assert all(counts[item.id] == item.score for item in answer.items)


def test_who_has_seen_everything_gets_nothing(shop: Recommender) -> None:
    ids = shop.artefact.ids[1:]
    everything, other = shop.recommend([Request(history=ids, filter_seen=True), Request(history=ids[:1])])
    assert everything.items == []
    assert other.items


def test_exclude_candidates_where_and_quotas(shop: Recommender) -> None:
    ids = shop.artefact.ids[1:]
    name, column = next(
        (name, column) for name, column in shop.artefact.attributes.items() if len(set(map(str, column))) > 2
    )
    plain = [item.id for item in shop.recommend(Request(history=ids[:1], k=len(ids))).items]
    left = shop.recommend(Request(history=ids[:1], k=len(ids), exclude=plain[:2])).items
    assert [item.id for item in left] == plain[2:]
    among = shop.recommend(Request(history=ids[:1], candidates=[*plain[3:6], "unknown"], k=9))
    assert [item.id for item in among.items] == plain[3:6]
    assert among.unknown == ["unknown"]
    value = next(v for v in column[1:] if v and not isinstance(v, list))
    of_value = {ids[row] for row, v in enumerate(column[1:]) if v == value}
    matching = shop.recommend(Request(history=ids[:1], where={name: value}, k=len(ids))).items
    assert [item.id for item in matching] == [id_ for id_ in plain if id_ in of_value]
    quota = shop.recommend(Request(history=ids[:1], at_most={name: 1}, k=len(ids))).items
    values = [column[ids.index(item.id) + 1] for item in quota]
    named = [v for v in values if v]
    assert len(named) == len(set(map(str, named)))
    assert shop.recommend(Request(history=ids[:1], where={name: "no such value"})).items == []


def test_diversity_from_score_alone_to_difference(shop: Recommender) -> None:
    ids = shop.artefact.ids[1:]
    plain = [item.id for item in shop.recommend(Request(history=ids[:1], k=4)).items]
    slightly = [item.id for item in shop.recommend(Request(history=ids[:1], k=4, diversity=1e-9)).items]
    assert slightly == plain
    diverse = [item.id for item in shop.recommend(Request(history=ids[:1], k=4, diversity=1.0)).items]
    assert diverse[0] == plain[0]
    unit = torch.nn.functional.normalize(shop.artefact.vectors, dim=-1)

    def closeness(chosen: list[str]) -> float:
        v = unit[[shop.artefact.ids.index(id_) for id_ in chosen]]
        return float((v @ v.t()).triu(1).sum())

    assert closeness(diverse) <= closeness(plain) + 1e-6


def test_exploration(shop: Recommender) -> None:
    ids = shop.artefact.ids[1:]
    plain = [item.id for item in shop.recommend(Request(history=ids[:1], k=9)).items]
    none = shop.recommend(Request(history=ids[:1], k=9, explore="ucb", exploration=0.0))
    assert [item.id for item in none.items] == plain
    deviation = shop.state.last_layer.deviation
    x = shop.artefact.vectors.double() / shop.state.last_layer.scale
    precision = torch.eye(x.shape[1], dtype=torch.float64) + (x.t() * shop.artefact.counts) @ x
    wanted = (x @ torch.linalg.inv(precision) * x).sum(1).sqrt()
    torch.testing.assert_close(deviation.double(), wanted, atol=1e-5, rtol=1e-4)
    first = shop.recommend(Request(history=ids[:1], k=9, explore="thompson", exploration=5.0, seed=1))
    again = shop.recommend(Request(history=ids[:1], k=9, explore="thompson", exploration=5.0, seed=1))
    assert first == again
    draws = {
        tuple(
            item.id
            for item in shop.recommend(
                Request(history=ids[:1], k=9, explore="thompson", exploration=5.0, seed=seed)
            ).items
        )
        for seed in range(5)
    }
    assert len(draws) > 1


def test_thompson_draws_have_the_deviation_that_ucb_adds() -> None:
    from lightning_rec.recommend.explore import LastLayer

    random = torch.Generator().manual_seed(0)
    layer = LastLayer(torch.randn(30, 4, generator=random), torch.randint(0, 5, (30,), generator=random))
    vectors = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([vectors @ layer.draw(torch.zeros(4), 1.0, seed) for seed in range(4000)])
    torch.testing.assert_close(draws.std(0), layer.deviation, atol=0.02, rtol=0.06)


def test_interest_moves_with_every_round(artefact_of: Artefacts) -> None:
    recommender = Recommender.load(artefact_of("id_sequence"))
    ids = recommender.artefact.ids[1:]
    assert recommender.recommend(Request(user="new")).path == "popularity"
    for round_ in range(1, 4):
        assert recommender.update("new", [Event(ids[round_], time=round_, id=f"e{round_}")]) == 1
        by_user = recommender.recommend(Request(user="new"))
        by_history = recommender.recommend(Request(history=ids[1 : round_ + 1], times=list(range(1, round_ + 1))))
        assert by_user.items == by_history.items
    assert recommender.update("new", [Event(ids[1], time=1, id="e1")]) == 0
    assert recommender.forget("new") == 3
    assert recommender.recommend(Request(user="new")).path == "popularity"


def test_half_life(artefact_of: Artefacts) -> None:
    recommender = Recommender.load(artefact_of("id_sequence"))
    ids = recommender.artefact.ids[1:]
    request = Request(history=ids[:3], times=[0, 100, 200], k=5)
    for shortest in (1e-3, 1e-60, 5e-324):
        newest_only = recommender.recommend(replace(request, half_life=shortest))
        assert newest_only.path == "towers"
        assert newest_only.items == recommender.recommend(request).items
    state = recommender.state
    steps = recommender.interests.read([replace(request, half_life=100.0)], state)[0].vector
    users = UserBatch(torch.tensor([[1, 2, 3]]), torch.tensor([3]), torch.tensor([0]))
    with torch.no_grad():
        each = recommender.artefact.interests(users)[0]
    weights = torch.tensor([0.25, 0.5, 1.0])
    wanted = (weights / weights.sum()) @ each
    torch.testing.assert_close(steps, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", ["language_user", "popularity", "matrix_factorisation", "rating_bias"])
def test_a_tower_with_one_vector_a_user_refuses_a_half_life(artefact_of: Artefacts, config: str) -> None:
    recommender = Recommender.load(artefact_of(config))
    ids = recommender.artefact.ids[1:]
    request = Request(history=ids[:3], times=[0, 100, 200])
    recommender.check(request)
    for asked in (replace(request, half_life=50.0), Request(user=recommender.users(1)[0], half_life=50.0)):
        for call in (recommender.check, recommender.recommend, lambda asked: recommender.score(asked, ids[:1])):
            with pytest.raises(
                RequestError, match=r"one interest vector for a whole history.*Leave half_life out"
            ) as caught:
                call(asked)
            assert caught.value.code == "no_half_life"


def test_check_knows_of_words_that_no_tower_reads(artefact_of: Artefacts) -> None:
    recommender = Recommender.load(artefact_of("id_sequence"))
    ids = recommender.artefact.ids[1:]
    recommender.update("stored", [Event(ids[0], time=1)])
    fitted = recommender.users(5)[-1]
    requests = [
        Request(history=ids[:1]),
        Request(text="lamp"),
        Request(user="nobody", text="lamp"),
        Request(user="stored", text="lamp"),
        Request(user=fitted, text="lamp"),
        Request(history=["unknown"], text="lamp"),
        Request(history=["unknown", ids[2]], text="lamp"),
        Request(text=""),
    ]
    refused = {1, 2, 5}
    for place in refused:
        for call in (recommender.check, recommender.recommend):
            with pytest.raises(RequestError, match=r"reads no text") as caught:
                call(requests[place])
            assert caught.value.code == "no_text_tower"
    good = [request for place, request in enumerate(requests) if place not in refused]
    for request in good:
        recommender.check(request)
    assert len(recommender.recommend(good)) == len(good), "what check lets pass is answered"
    with_words = recommender.explain(Request(history=ids[:1], text="lamp"), ids[3])
    assert [reason.effect for reason in with_words.reasons] == [pytest.approx(with_words.score)]


def test_new_changed_and_removed_items(shop: Recommender) -> None:
    ids = shop.artefact.ids[1:]
    before = shop.generation
    old_state = shop.state
    shop.add_items([{"item_id": "new", "title": "red shoe"}])
    assert shop.generation == before + 1
    assert "new" not in old_state.rows
    assert shop.item("new")["title"] == "red shoe"
    everything = shop.recommend(Request(history=ids[:1], k=1000)).items
    assert "new" in [item.id for item in everything]
    text = shop.artefact.item_text({"title": "red shoe"})
    direct = shop.artefact.ready(shop.artefact.encode_texts([text]))
    vector = shop.interests.read([Request(history=ids[:1])], shop.state)[0].vector
    assert vector is not None
    assert float(direct[0] @ vector) == pytest.approx(next(i.score for i in everything if i.id == "new"), rel=1e-5)
    assert shop.recommend(Request(history=["new"])).path == "towers"
    with pytest.raises(RequestError, match="already"):
        shop.add_items([{"item_id": "new", "title": "x"}])
    row = shop.state.rows["new"]
    raw = shop.state.raw[row].clone()
    shop.update_items([{"item_id": "new", "stock": "3"}])
    assert torch.equal(shop.state.raw[row], raw)
    assert shop.item("new")["stock"] == "3"
    shop.update_items([{"item_id": "new", "title": "space film"}])
    assert not torch.equal(shop.state.raw[row], raw)
    shop.remove_items(["new", ids[0]])
    gone = shop.recommend(Request(history=["new", ids[0]], k=1000))
    assert gone.path == "towers"
    assert not {"new", ids[0]} & {item.id for item in gone.items}
    with pytest.raises(RequestError, match="no item"):
        shop.item("new")
    shop.add_items([{"item_id": ids[0], "title": "old again"}])
    assert shop.state.rows[ids[0]] == 1
    assert shop.n_items == len(ids)
    with pytest.raises(RequestError, match="no item"):
        shop.remove_items([ids[1], "unknown"])
    assert shop.item(ids[1])


def test_an_id_tower_cannot_take_new_items(artefact_of: Artefacts) -> None:
    recommender = Recommender.load(artefact_of("id_sequence"))
    with pytest.raises(RequestError) as caught:
        recommender.add_items([{"item_id": "new", "title": "x"}])
    assert caught.value.code == "no_text_tower"
    with pytest.raises(RequestError):
        recommender.recommend(Request(text="red shoe"))
    assert "new" not in recommender.state.rows


def test_readers_never_see_a_mixture(shop: Recommender) -> None:
    """Each catalogue holds exactly one of two marks; an answer with both or neither is a mixture."""
    shop.add_items([{"item_id": "mark-0", "title": "red shoe"}])
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            answer = shop.recommend(Request(history=shop.artefact.ids[1:2], k=10_000, filter_seen=False))
            marks = [item.id for item in answer.items if item.id.startswith("mark")]
            if len(marks) != 1:
                wrong.append(marks)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(1, 6):
        shop.change_items(
            lambda state, number=number: [
                *additions(state, [{"item_id": f"mark-{number}", "title": "boot"}], 0),
                *removals(state, [f"mark-{number - 1}"]),
            ]
        )
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Request(k=0), "bad_k"),
        (Request(diversity=2), "bad_diversity"),
        (Request(k=2.5), "bad_k"),
        (Request(k="5"), "bad_k"),
        (Request(exploration=-1), "bad_exploration"),
        (Request(explore="ucb", exploration=float("nan")), "bad_exploration"),
        (Request(explore="thompson", exploration=float("inf")), "bad_exploration"),
        (Request(history="t01"), "bad_history"),
        (Request(candidates="t01"), "bad_candidates"),
        (Request(exclude="t01"), "bad_exclude"),
        (Request(history=["a"], times=[1, 2]), "bad_times"),
        (Request(history=["a"], half_life=3.0), "no_times"),
        (Request(half_life=0.0), "bad_half_life"),
        (Request(where={"colour_": "red"}), "unknown_field"),
        (Request(at_most={"colour_": 1}), "unknown_field"),
        (Request(at_most={"title": 0}), "bad_quota"),
    ],
)
def test_bad_requests_name_the_option(shop: Recommender, request_: Request, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        shop.recommend([Request(), request_])
    assert caught.value.code == code
    assert caught.value.remedy


@pytest.mark.parametrize("config", ["matrix_factorisation", "language_user", "popularity", "text_pooled"])
def test_every_kind_of_tower_answers(artefact_of: Artefacts, config: str) -> None:
    recommender = Recommender.load(artefact_of(config))
    ids = recommender.artefact.ids[1:]
    user = recommender.users(1)[0]
    answers = recommender.recommend([Request(user=user), Request(history=ids[:2]), Request(user="nobody")])
    assert all(answer.items for answer in answers)
    assert answers[0].path == "towers"


def test_known_users_go_on_from_the_fitted_history(artefact_of: Artefacts) -> None:
    recommender = Recommender.load(artefact_of("id_sequence"))
    user = recommender.users(5)[0]
    events = recommender.history(user)
    assert events
    by_user = recommender.recommend(Request(user=user, k=3))
    by_history = recommender.recommend(Request(history=[event.item for event in events], k=3))
    assert [item.id for item in by_user.items] == [item.id for item in by_history.items]
