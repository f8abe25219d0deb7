"""What Prometheus reads: traffic, fallbacks, coverage, drift; and the example of alert rules over it."""

import re
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from lightning_rec.recommend import Answer, MemoryStore, Recommended, Recommender, Request
from lightning_rec.serve.metrics import LEAST, Reference, Window, drift

ALERTS = Path(__file__).parents[2] / "configs" / "serve" / "alerts.yaml"


def values(text):
    """Name with labels -> value."""
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#")
    }


def test_traffic_is_counted_by_route_and_status(serve, ask):
    app = serve()
    ask(
        app,
        ("POST", "/v1/recommend", {"requests": [{"user": "u001"}, {"k": 2}, {"where": {"no": 1}}]}),
        ("POST", "/v1/recommend", {"k": 0}),
        ("GET", "/v1/items/t01"),
        ("GET", "/v1/items/secret"),
        ("GET", "/wp-admin.php"),
        ("POST", "/v1/events", {"user": "a", "events": [{"item": "t01", "id": "1"}, {"item": "t01", "id": "1"}]}),
    )
    text = ask(app, ("GET", "/metrics")).text
    assert "secret" not in text
    assert "wp-admin" not in text
    found = values(text)
    name = "lightning_rec_requests_total"
    assert found[f'{name}{{method="POST",route="/v1/recommend",status="200"}}'] == 1
    assert found[f'{name}{{method="POST",route="/v1/recommend",status="422"}}'] == 1
    assert found[f'{name}{{method="GET",route="/v1/items/{{item_id:path}}",status="404"}}'] == 1
    assert found[f'{name}{{method="GET",route="other",status="404"}}'] == 1
    assert found['lightning_rec_request_seconds_count{route="/v1/recommend"}'] == 2
    assert found['lightning_rec_answers_total{path="towers"}'] == 1
    assert found['lightning_rec_answers_total{path="popularity"}'] == 1
    assert found['lightning_rec_refused_total{code="unknown_field"}'] == 1
    assert found['lightning_rec_events_total{kind="new"}'] == 1
    assert found['lightning_rec_events_total{kind="repeated"}'] == 1
    assert found["lightning_rec_fallback_share"] == 0.5
    assert found["lightning_rec_items"] == 30
    assert found["lightning_rec_batch_size_sum"] == 3


def test_coverage_is_of_the_living_catalogue(serve, ask):
    app = serve()
    ask(app, ("POST", "/v1/recommend", {"k": 6}), ("POST", "/v1/recommend", {"k": 6}))
    assert values(ask(app, ("GET", "/metrics")).text)["lightning_rec_catalogue_coverage"] == pytest.approx(6 / 30)
    shown = ask(app, ("POST", "/v1/recommend", {"k": 6})).json()["items"]
    ask(app, ("DELETE", "/v1/items", {"ids": [item["id"] for item in shown[:3]]}))
    assert values(ask(app, ("GET", "/metrics")).text)["lightning_rec_catalogue_coverage"] == pytest.approx(3 / 27)


def test_the_same_users_do_not_drift_and_others_do(serve, ask):
    app = serve(warm_up=True)
    for _ in range(200):
        if app.service.metrics.reference is not None:
            break
        time.sleep(0.05)
    users = ask(app, ("GET", "/v1/users?limit=100")).json()["users"]
    body = {"requests": [{"user": user, "k": 1, "filter_seen": True} for user in users] * 4}
    ask(app, ("POST", "/v1/recommend", body))
    same = values(ask(app, ("GET", "/metrics")).text)
    assert same["lightning_rec_score_drift_answers"] == 4 * len(users) >= LEAST
    assert same["lightning_rec_score_drift_psi"] < 0.05
    assert same["lightning_rec_score_drift_ks"] < 0.1
    body = {"requests": [{"history": ["t01"], "k": 1}] * 256}
    ask(app, ("POST", "/v1/recommend", body), ("POST", "/v1/recommend", body))
    drifted = values(ask(app, ("GET", "/metrics")).text)
    assert drifted["lightning_rec_score_drift_psi"] > 0.25
    assert drifted["lightning_rec_score_drift_ks"] > same["lightning_rec_score_drift_ks"]
    assert ask(app, ("POST", "/v1/reload")).status_code == 200  # another artefact has another distribution
    assert values(ask(app, ("GET", "/metrics")).text)["lightning_rec_score_drift_answers"] == 0


@pytest.mark.parametrize("config", ["language_user", "matrix_factorisation", "global_time"])
def test_users_that_are_known_by_more_than_their_items_do_not_drift(serve, ask, artefact_of, config):
    """By a text or a vector of their own, or by the times of their history."""
    app = serve(artefact_of(config))
    recommender = app.service.served.recommender
    users = recommender.users(100)
    answers = recommender.recommend([Request(user=user, k=1) for user in users])
    tops = [answer.items[0].score for answer in answers]
    assert {answer.path for answer in answers} == {"towers"}
    assert app.service.metrics.reference == Reference.of_scores(tops)
    body = {"requests": [{"user": user} for user in users] * 4}
    ask(app, ("POST", "/v1/recommend", body))
    found = values(ask(app, ("GET", "/metrics")).text)
    assert found["lightning_rec_score_drift_answers"] == 4 * len(users) >= LEAST
    assert found["lightning_rec_score_drift_psi"] < 0.05
    assert found["lightning_rec_score_drift_ks"] < 0.05
    body = {"requests": [{"user": users[0]}] * 256}
    ask(app, ("POST", "/v1/recommend", body), ("POST", "/v1/recommend", body))
    assert values(ask(app, ("GET", "/metrics")).text)["lightning_rec_score_drift_psi"] > 0.25


def test_the_reference_is_of_the_artefact_whatever_the_store_says(made):
    class Away(MemoryStore):
        def read(self, user, newest):
            raise OSError("gone")

    recommender = Recommender.load(made, store=Away())
    wanted = Recommender.load(made)
    users = wanted.users(1000)
    answers = wanted.recommend([Request(user=user, k=1) for user in users])
    assert Reference.of(recommender) == Reference.of_scores([answer.items[0].score for answer in answers])


def test_an_artefact_without_users_is_measured_by_its_items(made):
    recommender = Recommender.load(made)
    recommender.artefact.users = None
    reference = Reference.of(recommender)
    assert sum(reference.shares) == pytest.approx(1)
    assert reference.edges


def test_drift_by_hand():
    scores = [float(place) for place in range(100)]
    reference = Reference.of_scores(scores)
    assert drift(scores, reference) == (pytest.approx(0), pytest.approx(0))
    # all answers in the lowest of ten bins: 0.9 ln 10 there, and 9 times (0.0001 - 0.1) ln(0.0001 / 0.1) elsewhere
    index, distance = drift([0.0] * 100, reference)
    assert index == pytest.approx(0.9 * 2.302585 + 9 * 0.0999 * 6.907755, rel=1e-5)
    assert distance == pytest.approx(0.9)
    assert drift([0.0] * (LEAST - 1), reference) == (0, 0)
    assert drift(scores, Reference.of_scores([])) == drift(scores, None) == (0, 0)
    assert drift([5.0] * 100, Reference.of_scores([5.0] * 100)) == (pytest.approx(0), pytest.approx(0))


def test_old_answers_leave_the_window():
    window = Window(10)
    for number in range(12):
        window.add(Answer([Recommended(str(number), 1.0, "")], "towers" if number > 6 else "popularity"), number)
    assert window.shown == {str(number) for number in range(5, 12)}
    assert window.tops == [5, 6, 7, 8, 9, 10, 11]
    assert window.fallback_share == pytest.approx(2 / 7)
    window.clear()
    assert (window.shown, window.fallback_share) == (set(), 0)


def test_the_alert_rules_name_metrics_that_exist(serve, ask):
    text = ask(serve(), ("GET", "/healthz"), ("GET", "/metrics"))[1].text
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    assert len(rules) > 4
    for rule in rules:
        assert {"alert", "expr", "labels", "annotations"} <= set(rule)
        for name in re.findall(r"lightning_rec_\w+", rule["expr"]):
            assert f"\n{name}" in text, name
