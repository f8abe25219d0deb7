"""Users of the user table without a single interaction: what ``predict`` says of them, a recommender says too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from lightning_rec.cli import main
from lightning_rec.recommend import Recommender, Request
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.export import export
from lightning_rec.recommend.stored_users import StoredUsers, users_table
from lightning_rec.serve.forgotten import Forgotten

SHOP = Path(__file__).parent.parent / "data" / "files" / "shop"
#: ``mute`` has no profile that says anything.
MORE = "river,old river,\nspace,space war,\nmute,,\n"
ASKED = ["river", "u003", "nobody", "space", "mute", "river", "u001"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shop's user table with three users more, one of them in the middle."""
    lines = (SHOP / "users.csv").read_text().splitlines(keepends=True)
    path = tmp_path_factory.mktemp("profiles") / "users.csv"
    first, *others = MORE.splitlines(keepends=True)
    path.write_text("".join([*lines[:5], first, *lines[5:], *others]))
    return path


@pytest.fixture(scope="module")
def checkpoint(run_of: Callable[..., Path], table: Path) -> Path:
    return run_of("language_user", {"SHOP/users.csv": str(table)})


def predicted(checkpoint: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    place = ["--predictions.format", "jsonl", "--predictions.path", str(out)]
    main(["predict", "--ckpt_path", str(checkpoint), *place, *options])
    return [json.loads(line) for line in out.read_text().splitlines()]


def groups(rows: list[dict[str, Any]]) -> list[tuple[str, str, list[tuple[str, float]]]]:
    """User, source and answers of each group of rows, in order."""
    found: list[tuple[str, str, list[tuple[str, float]]]] = []
    for row in rows:
        if row["rank"] == 1:
            found.append((row["user_id"], row["source"], []))
        assert (row["user_id"], row["source"]) == found[-1][:2]
        found[-1][2].append((row["item_id"], row["score"]))
    return found


def test_a_recommender_answers_as_predict_does(checkpoint: Path, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "asked.txt").write_text("\n".join(ASKED))
    found = groups(predicted(checkpoint, tmp_path / "out.jsonl", "--data.predict_users", str(tmp_path / "asked.txt")))
    assert [user for user, _, _ in found] == ASKED
    sources = ["towers", "towers", "popularity", "towers", "popularity", "towers", "towers"]
    assert [source for _, source, _ in found] == sources
    assert found[0] == found[5]
    assert dict(found[0][2]) != dict(found[3][2]), "another profile has other scores"
    with caplog.at_level("INFO"):
        export(checkpoint, tmp_path / "artefact", progress=False)
    assert "42 users, 2 of them by their profile only, were exported" in caplog.text
    recommender = Recommender.load(tmp_path / "artefact")
    answers = recommender.recommend([Request(user=user, k=10) for user in ASKED])
    assert [answer.path for answer in answers] == sources
    for answer, (user, source, wanted) in zip(answers, found, strict=True):
        assert [item.id for item in answer.items] == [id_ for id_, _ in wanted], user
        if source == "towers":
            assert [item.score for item in answer.items] == pytest.approx([score for _, score in wanted], abs=1e-5)
    out = tmp_path / "answers.jsonl"
    users = ["--users", str(tmp_path / "asked.txt")]
    main(["recommend", str(tmp_path / "artefact"), *users, "--k", "10", "--output", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [[item["id"] for item in line["items"]] for line in lines] == [
        [item.id for item in answer.items] for answer in answers
    ]


def test_everyone_is_asked_for_where_nobody_is_named(checkpoint: Path, tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO"):
        found = groups(predicted(checkpoint, tmp_path / "out.jsonl"))
    assert "43 users: " in caplog.text
    assert [(user, source) for user, source, _ in found[40:]] == [
        ("river", "towers"),
        ("space", "towers"),
        ("mute", "popularity"),
    ]
    assert {source for _, source, _ in found[:40]} == {"towers"}


@pytest.mark.parametrize("config", ["language_user", "id_sequence", "matrix_factorisation", "rating_text"])
def test_a_longer_user_table_changes_nothing_for_the_others(
    run_of: Callable[..., Path], table: Path, tmp_path: Path, config: str
) -> None:
    """A checkpoint that was fitted without them loads, and its figures and answers stay to the last bit."""
    shutil.copytree(run_of(config).parent.parent, tmp_path / "run")  # other tests share it, and want no figures in it
    fitted = tmp_path / "run" / "checkpoints" / "last.ckpt"
    figures, answers = [], []
    for number, users in enumerate((SHOP / "users.csv", table)):
        more = ["--data.reader.users", str(users)]
        main(["test", "--ckpt_path", str(fitted), *more])
        figures.append(json.loads((tmp_path / "run" / "test_metrics.json").read_text()))
        answers.append(groups(predicted(fitted, tmp_path / f"{number}.jsonl", *more)))
    assert figures[0] == figures[1]
    assert len(figures[0]["metrics"]) > 5
    assert answers[1][:40] == answers[0]
    source = "towers" if config in ("language_user", "rating_text") else "popularity"
    assert [(user, source) for user, source, _ in answers[1][40:]] == [
        ("river", source),
        ("space", source),
        ("mute", "popularity"),
    ]


def test_what_an_artefact_keeps_of_them(run_of: Callable[..., Path], checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "artefact", progress=False)
    artefact = Artefact.read(tmp_path / "artefact")
    users = artefact.users
    assert users is not None
    assert artefact.manifest.n_users == 41
    assert artefact.manifest.parts["users"]["profile_only"] == 2
    assert users.ids[40:] == ["river", "space"], "of mute there is nothing to keep"
    assert users.row("u040") == 40
    assert users.row("river") == 0
    assert users.profile("river") == ({"city": "old river", "age": ""}, [])
    assert artefact.user_text([], "space") == "space war"
    assert users.history("river", 5) == []
    assert users.touched("river") == []
    assert users.sample(100) == users.ids[:40]
    without = run_of("language_user")
    export(without, tmp_path / "without", progress=False)
    assert Artefact.read(tmp_path / "without").manifest.parts["users"] == {"kind": "users"}
    mine, other = (pq.read_table(tmp_path / name / "users.parquet") for name in ("artefact", "without"))
    assert mine.slice(0, 40).equals(other)


def test_towers_that_read_no_text_keep_no_profiles_of_them(
    run_of: Callable[..., Path], table: Path, tmp_path: Path
) -> None:
    fitted = run_of(
        "id_sequence", {"SHOP/users.csv": str(table), "min_rating: 0": 'min_rating: 0\n    user_template: "{city}"'}
    )
    export(fitted, tmp_path / "artefact", progress=False)
    users = Artefact.read(tmp_path / "artefact").users
    assert users is not None
    assert len(users) == 40
    answer = Recommender.load(tmp_path / "artefact").recommend(Request(user="river"))
    assert answer.path == "popularity"


def test_forgetting_a_user_forgets_the_profile(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "artefact", progress=False)
    recommender = Recommender.load(tmp_path / "artefact")
    users = recommender.artefact.users
    assert users is not None
    assert recommender.recommend(Request(user="river")).path == "towers"
    assert recommender.forget("river") == 0, "there were no events"
    assert recommender.recommend(Request(user="river")).path == "popularity"
    assert users.profile("river") == ({}, [])
    assert recommender.artefact.user_text([], "river") == ""
    assert recommender.recommend(Request(user="space")).path == "towers"
    assert recommender.forget("u001") > 0
    assert users.profile("u001") == ({}, [])


def test_who_asked_to_be_forgotten_stays_so_in_another_process(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "artefact", progress=False)
    here, there = (Recommender.load(tmp_path / "artefact") for _ in range(2))
    Forgotten(here.store).add("river")
    Forgotten(here.store).apply(there, everyone=True)
    assert [there.recommend(Request(user=user)).path for user in ("river", "space")] == ["popularity", "towers"]


def test_words_and_a_profile_that_says_the_same_are_answered_alike(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "artefact", progress=False)
    recommender = Recommender.load(tmp_path / "artefact")
    profile, words = recommender.recommend([Request(user="river"), Request(text="old river")])
    assert (profile.path, words.path) == ("towers", "text")
    assert [item.id for item in profile.items] == [item.id for item in words.items]


def test_an_explanation_names_no_history(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "artefact", progress=False)
    recommender = Recommender.load(tmp_path / "artefact")
    top = recommender.recommend(Request(user="river", k=1)).items[0]
    explanation = recommender.explain(Request(user="river"), top.id)
    assert explanation.score == pytest.approx(top.score)
    assert explanation.reasons == []
    assert explanation.sentence == f"“{top.text}” is recommended because of what is known of you, without a history."


def test_users_without_interactions_come_last_and_have_no_row() -> None:
    items = np.array([0, 2, 2]), np.array([1, 2])
    users = StoredUsers(
        users_table(["a", "b"], items, None, None, [{}, {}], None, {"c": {"city": "x"}}), ["", "i", "j"]
    )
    assert (len(users), users.ids) == (3, ["a", "b", "c"])
    assert [users.row(user) for user in "abcd"] == [1, 2, 0, 0]
    assert [event.item for event in users.history("a", 9)] == ["i", "j"]
    assert users.history("b", 9) == users.history("c", 9) == users.touched("c") == []
    assert users.profile("c") == ({"city": "x"}, [])
    users.forget("c")
    assert users.profile("c") == ({}, [])
