"""Concurrent calls are joined, and one of them does not disturb another."""

import asyncio
import threading

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from lightning_rec.recommend import Answer, MemoryStore, Recommended, Request, RequestError
from lightning_rec.serve.batching import Batcher
from lightning_rec.serve.errors import ServiceError


class Slow:
    """A recommender that waits for leave; it echoes the user and the number of its call."""

    def __init__(self, free=True):
        self.store = MemoryStore()
        self.leave = threading.Event()
        self.sizes = []
        if free:
            self.leave.set()

    def check(self, request):
        if request.k < 1:
            raise RequestError("k is 0.", "bad_k", "Ask for more.")

    def recommend(self, requests):
        if isinstance(requests, Request):
            if requests.text == "bad":
                raise RequestError("No words.", "no_text_tower")
            return self._answer(requests)
        self.sizes.append(len(requests))
        assert self.leave.wait(10)
        if any(request.text == "bad" for request in requests):
            raise RequestError("No words.", "no_text_tower")
        if any(request.text == "crash" for request in requests):
            raise KeyError("crash")
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        return Answer([Recommended(str(request.user), float(len(self.sizes)), "")], "towers")


@pytest.fixture
def batcher():
    made = []

    def make(recommender, **options):
        made.append(Batcher(lambda: (recommender, "name"), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


async def gathered(batcher, recommender, groups):
    """Makes the first call, and the others while it is answered."""
    first = asyncio.create_task(batcher.recommend(groups[0]))
    while not recommender.sizes:
        await asyncio.sleep(0.001)
    others = [asyncio.create_task(batcher.recommend(group)) for group in groups[1:]]
    await asyncio.sleep(0.01)
    recommender.leave.set()
    return await asyncio.gather(first, *others, return_exceptions=True)


def users(result):
    return [outcome.items[0].id for outcome in result[1]]


def test_what_waits_is_answered_by_one_call(batcher):
    recommender, sizes = Slow(free=False), []
    groups = [[Request(user=f"{place}")] for place in range(40)]
    found = asyncio.run(gathered(batcher(recommender, observe=sizes.append), recommender, groups))
    assert [users(result) for result in found] == [[f"{place}"] for place in range(40)]
    assert recommender.sizes == sizes == [1, 39]


def test_batches_are_no_larger_than_allowed_and_calls_stay_whole(batcher):
    recommender = Slow(free=False)
    groups = [[Request(user=f"{place}{letter}") for letter in "abc"] for place in range(5)]
    groups.append([Request(user=f"long{place}") for place in range(20)])
    found = asyncio.run(gathered(batcher(recommender, max_batch=8), recommender, groups))
    assert [users(result) for result in found] == [[request.user for request in group] for group in groups]
    assert recommender.sizes == [3, 6, 6, 20]


def test_one_bad_request_does_not_fail_its_neighbours(batcher):
    recommender = Slow(free=False)
    groups = [
        [Request(user="a")],
        [Request(user="b")],
        [Request(user="c", k=0), Request(user="d")],
        [Request(user="e", text="bad")],
    ]
    first, second, third, fourth = asyncio.run(gathered(batcher(recommender), recommender, groups))
    assert users(first) == ["a"]
    assert users(second) == ["b"]
    assert third[1][0].code == "bad_k"
    assert third[1][1].items[0].id == "d"
    assert fourth[1][0].code == "no_text_tower"


def test_a_crash_is_told_to_every_call_of_the_batch_and_the_thread_lives_on(batcher):
    recommender = Slow()
    one = batcher(recommender)

    async def work():
        with pytest.raises(KeyError):
            await one.recommend([Request(text="crash")])
        return await one.recommend([Request(user="a")])

    assert users(asyncio.run(work())) == ["a"]


def test_calls_that_were_given_up_are_not_answered(batcher):
    recommender = Slow(free=False)
    one = batcher(recommender)

    async def work():
        first = asyncio.create_task(one.recommend([Request(user="a")]))
        while not recommender.sizes:
            await asyncio.sleep(0.001)
        given_up = [asyncio.create_task(one.recommend([Request(user="b")])) for _ in range(5)]
        await asyncio.sleep(0.01)
        for task in given_up:
            task.cancel()
        last = asyncio.create_task(one.recommend([Request(user="c")]))
        await asyncio.sleep(0.01)
        recommender.leave.set()
        return await first, await last

    first, last = asyncio.run(work())
    assert (users(first), users(last)) == (["a"], ["c"])
    assert recommender.sizes == [1, 1]


def test_too_much_waiting_is_refused(batcher):
    recommender = Slow(free=False)
    one = batcher(recommender, max_waiting=2)
    found = asyncio.run(gathered(one, recommender, [[Request(user=f"{place}")] for place in range(5)]))
    refused = [result for result in found if isinstance(result, ServiceError)]
    assert len(refused) == 2
    assert {(error.status, error.code) for error in refused} == {(503, "overloaded")}


def test_waiting_joins_calls_that_come_one_after_the_other(batcher):
    recommender = Slow()
    one = batcher(recommender, wait=0.3)

    async def work():
        async def later(place):
            await asyncio.sleep(0.01 * place)
            return await one.recommend([Request(user=f"{place}")])

        return await asyncio.gather(*(later(place) for place in range(4)))

    assert [users(result) for result in asyncio.run(work())] == [["0"], ["1"], ["2"], ["3"]]
    assert recommender.sizes == [4]


def test_closing_answers_what_waits():
    recommender = Slow()
    one = Batcher(lambda: (recommender, "name"), wait=5.0)

    async def work():
        waiting = asyncio.create_task(one.recommend([Request(user="a")]))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(one.close)
        with pytest.raises(ServiceError):
            await one.recommend([Request(user="b")])
        return await waiting

    assert users(asyncio.run(work())) == ["a"]


def test_concurrent_calls_of_the_service_are_joined(serve, within, monkeypatch):
    app = serve(batch_wait_ms=20)
    recommender = app.service.served.recommender
    real, sizes = recommender.recommend, []
    monkeypatch.setattr(recommender, "recommend", lambda requests: sizes.append(len(requests)) or real(requests))

    async def work(client):
        calls = [
            client.post("/v1/recommend", json={"history": ["t01"], "k": 3} if place % 10 else {"where": {"no": 1}})
            for place in range(100)
        ]
        return await asyncio.gather(*calls)

    found = within(app, work)
    assert [response.status_code for response in found] == [200 if place % 10 else 400 for place in range(100)]
    assert sum(sizes) == 90
    assert len(sizes) < 45
    # the last bits of a score depend on the size of the batch, and scores of a hardly trained model are nearly equal
    wanted = [item.score for item in real(Request(history=["t01"], k=3)).items]
    for response in found:
        if response.is_success:
            assert [item["score"] for item in response.json()["items"]] == pytest.approx(wanted, rel=1e-5)
