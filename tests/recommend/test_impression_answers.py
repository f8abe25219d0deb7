"""Answers from artefacts of impressions: what the moment adds, new articles, who is alive, reasons, commands."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_rec.cli import main
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.context import ContextIndex
from lightning_rec.recommend.export import export
from lightning_rec.recommend.fitted import open_run
from lightning_rec.recommend.recommender import Recommender
from lightning_rec.recommend.types import Event, Request

ROOT = Path(__file__).parent.parent.parent
HOUR = 3600

# ---------------------------------------------------------------------------------------------- the moment


def test_what_age_and_clicks_add_by_hand(newsroom: Any) -> None:
    artefact = Artefact.read(newsroom.run("words_nrms").artefact)
    context = artefact.context
    assert context is not None
    assert context.age is not None
    assert context.popularity is not None
    log = [line for folder in ("train", "dev") for line in newsroom.lines(newsroom.mind / folder)]
    first = newsroom.first_shown()

    def bucket(quantity: float, buckets: int, highest: float) -> int:
        return 1 + min(buckets - 1, int(math.log1p(quantity) / math.log1p(highest) * buckets))

    end = max(line.time for line in log)
    buckets = set()
    for moment in (min(first.values()), end - 5 * HOUR, end, end + 1, end + 50 * HOUR):
        added = context.at(moment)
        for row, id_ in enumerate(artefact.ids):
            age = 0
            if id_ in first:
                age = bucket(max(moment - first[id_], 0) / HOUR, 6, 48.0)
            clicks = [line.time for line in log for name in line.clicked if name == id_ and line.time < moment]
            recent = sum(2 ** -((moment - time) / (24 * HOUR)) for time in clicks)
            wanted = context.age.bias[age] + context.popularity.bias[bucket(recent, 9, 8.0)]
            assert added[row] == pytest.approx(float(wanted), abs=1e-6), (id_, moment)
            buckets.add((age, bucket(recent, 9, 8.0)))
    assert len(buckets) > 10
    assert "the last of 2019-11-13 11:09:02 UTC" in artefact.manifest.protocol


def test_the_whole_catalogue_in_the_order_of_its_scores(newsroom: Any) -> None:
    recommender = Recommender.load(newsroom.run("words_nrms").artefact)
    lines = [line for line in newsroom.lines(newsroom.mind / "dev") if line.history]
    recommender.now = lines[0].time
    requests = [Request(history=line.history, k=9, exclude=["N10"]) for line in lines[:5]]
    for request, answer in zip(requests, recommender.recommend(requests), strict=True):
        history = list(request.history or [])
        # what was read is left out, unless the candidates are named
        rest = [id_ for id_ in recommender.artefact.ids[1:] if id_ not in {*history, "N10"}]
        scores = recommender.score(request, rest).tolist()
        best = sorted(zip(scores, rest, strict=True), key=lambda pair: -pair[0])[:9]
        assert [item.score for item in answer.items] == pytest.approx([score for score, _ in best], abs=1e-5)
        named = recommender.recommend(Request(history=history, candidates=history, k=9)).items
        assert {item.id for item in named} == set(history)
        assert not recommender.recommend(Request(history=history, candidates=history, filter_seen=True)).items
    together = recommender.recommend([Request(history=lines[0].history, k=3)] * 12)
    assert all([item.id for item in answer.items] == [i.id for i in together[0].items] for answer in together)


def test_the_index_with_context() -> None:
    torch.manual_seed(0)
    vectors, interest, added = torch.randn(300, 8), torch.randn(11, 8), torch.randn(300)
    dead = torch.rand(300) < 0.3
    excluded = [torch.tensor([1, 5, 9])] * 11
    scores, rows = ContextIndex(vectors, added, dead).search(interest, 20, excluded)
    for user in range(11):
        wanted = {
            row: float(interest[user].double() @ vectors[row].double()) + float(added[row])
            for row in range(1, 300)
            if not dead[row] and row not in (1, 5, 9)
        }
        best = sorted(wanted, key=lambda row: -wanted[row])[:20]
        assert rows[user].tolist() == best
        torch.testing.assert_close(scores[user], torch.tensor([wanted[row] for row in best]), atol=1e-5, rtol=0)
    found, at = ContextIndex(vectors[:3], added[:3]).search(interest[:1], 5, [torch.tensor([2])])
    assert at.tolist() == [[1, 0]]
    assert found[0, 1] == -math.inf
    assert ContextIndex(vectors, added).search(interest[:0], 5)[0].shape == (0, 5)


def test_an_approximate_index_gives_way(newsroom: Any) -> None:
    pytest.importorskip("faiss", reason="the extra `index` is not installed")
    from lightning_rec.recommend.ann import make_index

    with pytest.warns(UserWarning, match=r"model\.age, model\.popularity.*the exact index answers"):
        recommender = Recommender.load(newsroom.run("words_nrms").artefact, make_index("hnsw"), now=1573600000)
    assert len(recommender.recommend(Request(history=["N1", "N2"], k=3)).items) == 3


def test_a_log_without_times(newsroom: Any, tmp_path: Path) -> None:
    """Ages and clicks are unknown then, whatever the moment, as in training; histories are in the order of the file."""
    ads = Path(newsroom.mind).parent / "ads"
    (tmp_path / "ads").mkdir()
    for name in ("ads.csv", "users.csv"):
        shutil.copy(ads / name, tmp_path / "ads")
    rows = [line.split(",") for line in (ads / "displays.csv").read_text().splitlines()]
    kept = [",".join([*row[:2], *row[3:6]]) + "\n" for row in rows]  # all but the time and what was written
    (tmp_path / "ads" / "displays.csv").write_text("".join(kept))
    config = newsroom.config("ids_ids")
    config["model"]["init_args"]["user_tower"] = newsroom.part("PooledUserTower", pooling="mean")
    options = {"path": str(tmp_path / "ads"), "max_history": 5, "split": "order"}
    config["data"] = {"class_path": "lightning_rec.AdsDataModule", "init_args": options}
    checkpoint = newsroom.fit(tmp_path / "run", config)
    with pytest.raises(ValueError, match=r"max_age needs the times of the impressions, and these have none"):
        export(checkpoint, tmp_path / "out", max_age=24, progress=False)
    export(checkpoint, tmp_path / "out", progress=False)
    found = newsroom.predicted(checkpoint, tmp_path / "out.parquet")
    recommender = Recommender.load(tmp_path / "out", now=1)
    context = recommender.artefact.context
    assert context is not None
    assert context.age is not None
    assert context.popularity is not None
    unknown = context.age.bias[0] + context.popularity.bias[0]
    assert context.at(5).tolist() == pytest.approx([float(unknown)] * len(recommender.artefact.ids))
    assert abs(float(unknown)) > 0
    clicks: dict[str, list[str]] = {}
    asked = set()
    for name, user, _, item, label, *_ in rows[1:]:
        if name in found and name not in asked:
            asked.add(name)
            request = Request(history=clicks.get(user), candidates=[row["item_id"] for row in found[name]], k=100)
            newsroom.assert_as_predicted(recommender.recommend(request, now=7), found[name], name)
        if label == "1":
            clicks.setdefault(user, []).append(item)
    assert len(asked) == len(found) > 5


# ---------------------------------------------------------------------------------------------- items


def fields_of(recommender: Recommender, id_: str) -> dict[str, Any]:
    state = recommender.state
    row = state.row(id_)
    return {name: column[row] for name, column in state.attributes.items() if column[row] is not None}


@pytest.mark.parametrize("name", ["words_nrms", "frozen_sequence", "lora_lstur", "text_cosine"])
def test_a_new_article_has_the_vector_that_it_would_have_in_the_catalogue(
    name: str, newsroom: Any, tmp_path: Path
) -> None:
    run = newsroom.run(name)
    recommender = Recommender.load(run.artefact, now=1573600000)
    line = "N500\tmusic\tsongs\tBig love song of the river\tThe &amp; new song.\tu\t{title}\t[]"
    entity = '[{"WikidataId": "Q900202", "Label": "River Stage"}]'
    # as the run would read it: a catalogue with one more line
    folder = tmp_path / "mind"
    shutil.copytree(newsroom.mind, folder)
    with (folder / "train" / "news.tsv").open("a", encoding="utf-8") as file:
        file.write(line.replace("{title}", entity) + "\n")
    config = yaml.safe_load((run.checkpoint.parent.parent / "config.yaml").read_text())
    config["data"]["init_args"]["reader"]["init_args"] |= {"train": str(folder / "train"), "test": str(folder / "dev")}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    fit = open_run(Path(shutil.copy(run.checkpoint, tmp_path / "run" / "checkpoints")))
    wanted = fit.encode_catalogue()[fit.data.catalogue.row("N500")]
    recommender.add_items(
        [
            {
                "item_id": "N500",
                "category": "music",
                "subcategory": "songs",
                "title": "Big love song of the river",
                "abstract": "The &amp; new song.",
                "entities": ["Q900202"],
            }
        ]
    )
    state = recommender.state
    torch.testing.assert_close(state.raw[state.row("N500")], wanted, atol=1e-5, rtol=0)
    assert "N500" in {item.id for item in recommender.recommend(Request(history=["N2", "N6"], k=100)).items}
    # one that says what another says has its vector; one that is changed and changed back has its own
    old, row = fields_of(recommender, "N6"), recommender.state.row("N6")
    recommender.add_items([{"item_id": "N600", **old}])
    torch.testing.assert_close(recommender.state.raw[recommender.state.row("N600")], state.raw[row], atol=1e-5, rtol=0)
    recommender.update_items([{"item_id": "N6", "abstract": "A film of war."}])
    assert not torch.allclose(recommender.state.raw[row], state.raw[row], atol=1e-4)
    recommender.update_items([{"item_id": "N6", "abstract": old["abstract"]}])
    assert torch.equal(recommender.state.raw[row], state.raw[row])
    recommender.update_items([{"item_id": "N6", "editor": "Ann"}])
    assert torch.equal(recommender.state.raw[row], state.raw[row])
    assert recommender.recommend(Request(text="love song", where={"editor": "Ann"}, k=5)).items[0].id == "N6"


def test_new_articles_have_an_age(newsroom: Any) -> None:
    recommender = Recommender.load(newsroom.run("words_nrms").artefact, now=1573700000)
    context = recommender.artefact.context
    assert context is not None
    assert context.age is not None
    assert context.popularity is not None
    recommender.add_items(
        [{"item_id": "now", "title": "A new film"}, {"item_id": "old", "title": "A new film", "published": 1573664000}]
    )
    request = Request(history=["N1", "N2"])
    now, old = recommender.score(request, ["now", "old"]).tolist()
    # 10 hours: log(11) / log(49) of 6 buckets is the fourth; nobody has clicked either
    assert now - old == pytest.approx(float(context.age.bias[1] - context.age.bias[4]), abs=1e-5)
    recommender.update_items([{"item_id": "N1", "published": 1573664000}])
    added = recommender.state.at(1573700000).added
    assert added is not None
    clicks = context.popularity.bucket(torch.tensor(0.0))
    assert float(added[recommender.state.row("now")]) == pytest.approx(
        float(context.age.bias[1] + context.popularity.bias[clicks]), abs=1e-6
    )
    first, then = context.at(1573700000)[recommender.state.row("N1")], added[recommender.state.row("N1")]
    days = context.age.bucket(torch.tensor((1573700000 - float(context.born[recommender.state.row("N1")])) / HOUR))
    assert float(then - first) == pytest.approx(float(context.age.bias[4] - context.age.bias[days]), abs=1e-6)


def test_articles_that_are_alive(newsroom: Any, tmp_path: Path) -> None:
    manifest = export(newsroom.run("words_nrms").checkpoint, tmp_path / "out", max_age=30, progress=False)
    assert manifest.parts["lives"] == {"kind": "lives", "max_age": 30}
    assert "limited to items that are at most 30 hours old" in manifest.protocol
    log = [line for folder in ("train", "dev") for line in newsroom.lines(newsroom.mind / folder)]
    first = newsroom.first_shown()
    end = max(line.time for line in log)
    recommender = Recommender.load(tmp_path / "out", now=end)
    free = Recommender.load(newsroom.run("words_nrms").artefact)
    sizes = set()
    for moment in (
        min(first.values()) - 1,
        min(first.values()),
        end - 20 * HOUR,
        end,
        end + 29 * HOUR,
        end + 31 * HOUR,
    ):
        alive = {id_ for id_, born in first.items() if born <= moment <= born + 30 * HOUR}
        for request in (
            Request(history=["N1", "N5"], k=100, filter_seen=False),
            Request(history=["N1", "N5"], k=100, candidates=recommender.artefact.ids[1:]),
            Request(k=100),
            Request(text="love", k=100, where={"category": ["music", "sports", "movies", "fashion"]}),
        ):
            found = {item.id: item.score for item in recommender.recommend(request, now=moment).items}
            if request.where:
                assert found.keys() <= alive
                continue
            assert found.keys() == alive
            wanted = {item.id: item.score for item in free.recommend(request, now=moment).items}
            assert found == pytest.approx({id_: wanted[id_] for id_ in found}, abs=1e-6)
        sizes.add(len(alive))
    assert {0} < sizes
    assert len(sizes) > 3
    recommender.add_items([{"item_id": "N700", "title": "The old river"}])
    assert "N700" in {item.id for item in recommender.recommend(Request(history=["N1"], k=100)).items}
    recommender.now = end + 31 * HOUR
    assert not recommender.recommend(Request(history=["N1"], k=100)).items


# ---------------------------------------------------------------------------------------------- reasons


@pytest.mark.parametrize("name", ["words_nrms", "frozen_sequence", "text_cosine", "full_pooled"])
def test_reasons_by_brute_force(name: str, newsroom: Any) -> None:
    moment = newsroom.lines(newsroom.mind / "dev")[0].time
    recommender = Recommender.load(newsroom.run(name).artefact, now=moment)
    history = ["N3", "N1", "N2", "N7777", "N5", "N1", "N4", "N6", "N8", "N7"]  # the first is not read where max is 8
    drops = name == "full_pooled"
    found = recommender.explain(Request(history=history), "N13")
    assert found.score == pytest.approx(float(recommender.score(Request(history=history), ["N13"])[0]), abs=1e-6)
    read = [id_ for id_ in history if id_ != "N7777"] if drops else history
    assert {reason.id for reason in found.reasons} == {*read[-8:]} - {"N7777"}
    assert {reason.place for reason in found.reasons} <= set(range(8))
    for reason in found.reasons:
        rest = [id_ for id_ in history if id_ != reason.id]
        without = float(recommender.score(Request(history=rest), ["N13"])[0])
        assert reason.effect == pytest.approx(found.score - without, abs=1e-5)
        assert read[-8:][reason.place] == reason.id
    # without the only article nothing is left but what the moment adds
    alone = recommender.explain(Request(history=["N3"]), "N13")
    added = recommender.state.at(moment).added
    rest_score = 0.0 if added is None else float(added[recommender.state.row("N13")])
    assert alone.reasons[0].effect == pytest.approx(alone.score - rest_score, abs=1e-6)


def test_words_of_titles_and_abstracts(newsroom: Any) -> None:
    recommender = Recommender.load(newsroom.run("words_nrms").artefact, now=1573600000)
    fields = fields_of(recommender, "N13")
    found = recommender.explain(Request(history=["N1", "N3"]), "N13", words="occlusion")
    words = [*fields["title"].split(), *fields["abstract"].split()]
    assert [word.text for word in found.words] == words
    place = recommender.state.row("N13")
    interest = recommender.interests.read([Request(history=["N1", "N3"])], recommender.state)[0].vector
    assert interest is not None
    whole = float(recommender.state.ready[place] @ interest)
    split = len(fields["title"].split())
    for number in (0, 3, split, len(words) - 1):
        title = [word for at, word in enumerate(words[:split]) if at != number]
        abstract = [word for at, word in enumerate(words[split:], start=split) if at != number]
        changed = fields | {"title": " ".join(title), "abstract": " ".join(abstract)}
        recommender.add_items([{"item_id": f"without{number}", **changed}])
        score = float(recommender.state.ready[recommender.state.row(f"without{number}")] @ interest)
        assert found.words[number].effect == pytest.approx(whole - score, abs=1e-5)


# ---------------------------------------------------------------------------------------------- commands


def test_commands_events_filters_and_quotas(newsroom: Any, tmp_path: Path) -> None:
    folder, output = str(newsroom.run("words_nrms").artefact), str(tmp_path / "out.jsonl")
    line = newsroom.lines(newsroom.mind / "dev")[0]
    asked = ["--history", json.dumps(line.history), "--candidates", json.dumps(line.candidates), "--k", "9"]
    main(["recommend", folder, *asked, "--now", str(line.time), "--output", output])
    said = json.loads(Path(output).read_text())
    recommender = Recommender.load(folder, now=line.time)
    answer = recommender.recommend(Request(history=line.history, candidates=line.candidates, k=9))
    assert {item["id"]: item["score"] for item in said["items"]} == pytest.approx(
        {item.id: item.score for item in answer.items}
    )
    main(["explain", folder, "N13", *asked[:2], "--now", str(line.time), "--format", "json", "--output", output])
    assert json.loads(Path(output).read_text())["score"] == pytest.approx(
        recommender.explain(Request(history=line.history), "N13").score
    )
    checkpoint = str(newsroom.run("words_nrms").checkpoint)
    main(["export", checkpoint, str(tmp_path / "a"), "--max_age", "24", "--progress", "false"])
    assert Artefact.read(tmp_path / "a").manifest.parts["lives"]["max_age"] == 24
    sports = recommender.recommend(Request(history=line.history, where={"category": "sports"}, k=100)).items
    assert sports
    assert all(fields_of(recommender, item.id)["category"] == "sports" for item in sports)
    few = recommender.recommend(Request(history=line.history, at_most={"category": 1}, k=100)).items
    categories = [fields_of(recommender, item.id).get("category") for item in few]
    assert len({name for name in categories if name}) == len([name for name in categories if name])
    before = recommender.score(Request(user="U6"), ["N13"])
    recommender.update("U6", [Event("N10", line.time)])
    assert not torch.allclose(recommender.score(Request(user="U6"), ["N13"]), before)
    history = [event.item for event in recommender.history("U6")]
    assert history[-1] == "N10"
    torch.testing.assert_close(
        recommender.score(Request(user="U6"), ["N13"]), recommender.score(Request(history=history), ["N13"])
    )


def test_the_service(newsroom: Any) -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
    from fastapi.testclient import TestClient

    from lightning_rec.serve.app import create_app
    from lightning_rec.serve.settings import Settings

    folder = str(newsroom.run("words_nrms").artefact)
    line = newsroom.lines(newsroom.mind / "dev")[0]
    asked = {"history": line.history, "candidates": line.candidates, "k": 9}
    answer = Recommender.load(folder).recommend(Request(**asked), now=line.time)
    with TestClient(create_app(folder, Settings(store="memory:", now=line.time)), "http://localhost") as client:
        found = client.post("/v1/recommend", json=asked)
        assert found.status_code == 200, found.text
        items = found.json()["items"]
        assert [item["id"] for item in items] == [item.id for item in answer.items]
        assert [item["score"] for item in items] == pytest.approx([item.score for item in answer.items], abs=1e-5)


def test_answers_need_no_training_library(newsroom: Any) -> None:
    code = """
import sys
from lightning_rec.recommend import Recommender, Request
answer = Recommender.load(sys.argv[1], now=1573600000).recommend(Request(history=["N1", "N7777"], k=3))
assert answer.path == "towers" and len(answer.items) == 3
heavy = ("lightning", "wandb", "datasets", "transformers", "peft", "torchmetrics")
assert not [name for name in heavy if name in sys.modules], [name for name in heavy if name in sys.modules]
"""
    run = [sys.executable, "-c", code, str(newsroom.run("words_nrms").artefact)]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
