"""Export, recommend and explain by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_rec.cli import main
from lightning_rec.commands import make_parser, plain
from lightning_rec.recommend import Recommender, Request
from lightning_rec.recommend.explain import explain

HERE = Path(__file__).parent
SHOP = HERE / "data" / "files" / "shop"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str) -> Path:
    folder = tmp_path_factory.mktemp("run")
    text = (
        (HERE / "configs" / "text_id_gate.yaml").read_text().replace("SHOP", str(SHOP)).replace("TINY_BERT", tiny_bert)
    )
    (folder / "given.yaml").write_text(text)
    main(["fit", "--config", str(folder / "given.yaml"), "--trainer.default_root_dir", str(folder)])
    checkpoint = next(folder.rglob("last.ckpt"))
    main(["export", "--ckpt_path", str(checkpoint), "--output", str(folder / "out"), "--progress", "false"])
    return folder / "out"


def _error(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_one_request(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recommender = Recommender.load(artefact)
    ids = recommender.artefact.ids
    capsys.readouterr()
    main(["recommend", str(artefact), "--history", f"[{ids[1]}, {ids[2]}]", "--k", "3"])
    row = json.loads(capsys.readouterr().out)
    wanted = recommender.recommend(Request(history=[ids[1], ids[2]], k=3))
    assert [item["id"] for item in row["items"]] == [item.id for item in wanted.items]
    main(["recommend", str(artefact), "--text", "something red for a train ride"])
    assert json.loads(capsys.readouterr().out)["path"] == "text"


def test_one_request_says_what_is_wanted(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recommender = Recommender.load(artefact)
    request = Request(
        history=["t01", "t02"],
        times=[100, 200],
        k=4,
        filter_seen=False,
        candidates=["t01", "t03", "l01", "r01", "l02", "r02"],
        exclude=["l02"],
        where={"categories": ["tea", "lamp", "rope"]},
        at_most={"categories": 1},
        diversity=0.5,
        explore="ucb",
        exploration=0.1,
        half_life=50.0,
    )
    said = "--history [t01,t02] --times [100,200] --k 4 --filter_seen false --candidates [t01,t03,l01,r01,l02,r02]"
    said += " --exclude [l02] --where.categories [tea,lamp,rope] --at_most.categories 1 --diversity 0.5"
    said += " --explore ucb --exploration 0.1 --half_life 50"
    capsys.readouterr()
    main(["recommend", str(artefact), *said.split()])
    row = json.loads(capsys.readouterr().out)
    wanted = recommender.recommend(request).items
    assert [item["id"] for item in row["items"]] == [item.id for item in wanted]
    assert sorted(item["id"][0] for item in row["items"]) == ["l", "r", "t"]
    main(["recommend", str(artefact), "--user", "u001", "--k", "3", "--where", '{"categories": "rope"}'])
    assert {item["id"][0] for item in json.loads(capsys.readouterr().out)["items"]} == {"r"}


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (["--history", "[001, 1, 1.0, null, ~, t01]"], ["001", "1", "1.0", "null", "~", "t01"]),
        (["--history=[0x1F,'a, b']"], ["0x1F", "a, b"]),
        (["--history", '["1e3"]', "--history+", "[007]"], ["1e3", "007"]),
        (["--history", "[]"], []),
    ],
)
def test_ids_stay_as_they_are_written(given: list[str], ids: list[str]) -> None:
    for name, option in (("recommend", "history"), ("recommend", "candidates"), ("explain", "history")):
        args = plain(name, ["folder", *[arg.replace("history", option) for arg in given], "--user", "042"])
        found = make_parser(name).parse_args(args)
        assert found[option] == ids
        assert found.user == "042"


def test_a_file_of_users(artefact: Path, tmp_path: Path) -> None:
    users = ["u003", "u001", "nobody", "u001"]
    text, table = tmp_path / "users.txt", tmp_path / "users.parquet"
    text.write_text("\n".join(users))
    pq.write_table(pa.table({"user_id": users}), table)
    out = tmp_path / "out.jsonl"
    wanted = Recommender.load(artefact).recommend([Request(user=user, k=3, exclude=["t01"]) for user in users])
    for source in (text, table):
        main(
            ["recommend", str(artefact), "--users", str(source), "--output", str(out), "--k", "3", "--exclude", "[t01]"]
        )
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["user"] for row in rows] == users
        assert [[item["id"] for item in row["items"]] for row in rows] == [
            [item.id for item in answer.items] for answer in wanted
        ]
        assert [row["path"] for row in rows] == ["towers", "towers", "popularity", "towers"]


def test_a_file_of_requests(artefact: Path, tmp_path: Path) -> None:
    recommender = Recommender.load(artefact)
    ids = recommender.artefact.ids
    requests = [{"user": recommender.users(1)[0]}, {"history": [ids[3]], "k": 2}, {}, {"text": "blue boot"}]
    names = ("user", "history", "k", "text")
    lines = tmp_path / "requests.jsonl"
    lines.write_text("\n".join(json.dumps(request) for request in requests) + "\n\n")
    pq.write_table(
        pa.Table.from_pylist([dict.fromkeys(names) | request for request in requests]), tmp_path / "requests.parquet"
    )
    for source in (lines, tmp_path / "requests.parquet"):
        for ending in ("jsonl", "parquet"):
            out = tmp_path / f"answers.{ending}"
            main(["recommend", str(artefact), "--input", str(source), "--output", str(out), "--k", "4"])
            rows = (
                pq.read_table(out).to_pylist()
                if ending == "parquet"
                else [json.loads(line) for line in out.read_text().splitlines()]
            )
            wanted = recommender.recommend([Request(**({"k": 4} | request)) for request in requests])
            assert [[item["id"] for item in row["items"]] for row in rows] == [
                [item.id for item in answer.items] for answer in wanted
            ]
            assert [row["path"] for row in rows] == ["towers", "towers", "popularity", "text"]
            assert rows[0]["user"] == requests[0]["user"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"histroy": []}', "Did you mean 'history'"),
        ("[1]", "is an object of fields"),
        ("{", "request 2"),
        ('{"history": "i1"}', "a list of ids"),
        ('{"user": 7}', "user is an id"),
        ('{"k": 0}', "at least one item"),
        ('{"k": "three"}', "whole number"),
        ('{"where": {"colr": "red"}}', "does not have|do not have"),
    ],
)
def test_a_bad_request_is_named_or_answered(
    artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"k": 1}\n' + line + '\n{"k": 2}\n')
    main(["recommend", str(artefact), "--input", str(source), "--output", str(out), "--on_bad_rows", "skip"])
    rows = [json.loads(row) for row in out.read_text().splitlines()]
    assert [len(row["items"]) for row in rows] == [1, 0, 2]
    assert rows[1]["error"]["message"]
    capsys.readouterr()
    told = _error(capsys, "recommend", str(artefact), "--input", str(source), "--output", str(out))
    assert "request 2" in told
    assert any(part in told for part in message.split("|"))


def test_why(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = Recommender.load(artefact).artefact.ids
    who = ["--history", f"[{ids[1]}, {ids[2]}]"]
    capsys.readouterr()
    main(["explain", str(artefact), ids[4], *who, "--words", "occlusion", "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert {reason["id"] for reason in found["reasons"]} == {ids[1], ids[2]}
    assert found["words"]
    main(["explain", str(artefact), ids[4], *who])
    assert found["sentence"] in capsys.readouterr().out
    main(["explain", str(artefact), ids[4], *who, "--format", "html", "--output", str(artefact.parent / "why.html")])
    assert (artefact.parent / "why.html").read_text(encoding="utf-8").startswith('<div class="explanation">')
    assert capsys.readouterr().out == ""
    main(["explain", str(artefact), ids[4], "--sentences.popularity", "Many took {item}."])
    assert capsys.readouterr().out.startswith("Many took ")


def test_a_file_of_questions(artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"user": "u001", "item": "t00"}\n{"user": "u001"}\n{"text": "red boot", "item": "l01"}\n')
    asked = ["explain", str(artefact), "--input", str(source), "--words", "occlusion"]
    main([*asked, "--output", str(out), "--on_bad_rows", "skip", "--sentences.text", "{item} is near."])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    known = explain(Recommender.load(artefact), Request(user="u001"), "t00", words="occlusion")
    assert rows[0]["sentence"] == known.sentence
    assert rows[0]["words"] == [{"text": word.text, "effect": pytest.approx(word.effect)} for word in known.words]
    assert "which item is asked about" in rows[1]["error"]["message"]
    assert rows[2]["sentence"] == "Floor lamp is near."
    pq.write_table(pa.table({"user": ["u001", None], "item": ["t00", "l01"]}), tmp_path / "in.parquet")
    main(["explain", str(artefact), "--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out.parquet")])
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["item"] for row in table] == ["t00", "l01"]
    assert table[0]["sentence"] == known.sentence
    assert "request 2" in _error(capsys, *asked, "--output", str(out))


def test_what_does_not_go_together(artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"user": "u001", "item": "t00"}\n')
    told = _error(capsys, "recommend", str(artefact), "--input", str(source), "--users", str(source))
    assert "give one of them" in told
    told = _error(capsys, "recommend", str(artefact), "--users", str(source), "--text", "red")
    assert "leave out --text, or leave out --users" in told
    told = _error(capsys, "recommend", str(artefact), "--input", str(source), "--output", str(source))
    assert "read and written at once" in told
    assert source.read_text(), "it is not emptied"
    told = _error(capsys, "recommend", str(artefact), "--input", str(tmp_path / "none.jsonl"))
    assert "There is no file" in told
    assert "Say which item" in _error(capsys, "explain", str(artefact))
    assert "leave out t00" in _error(capsys, "explain", str(artefact), "t00", "--input", str(source))
    told = _error(capsys, "explain", str(artefact), "--input", str(source), "--format", "html")
    assert "a single explanation" in told


def test_what_cannot_be_done_is_one_sentence(
    artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Did you mean history?" in _error(capsys, "recommend", str(artefact), "--histroy", "[t01]")
    assert "required: ckpt_path" in _error(capsys, "export", "--output", str(tmp_path / "x"))
    assert "no artefact" in _error(capsys, "recommend", str(tmp_path))
    assert "no item with the id" in _error(capsys, "explain", str(artefact), "nothing")
    assert "no last.ckpt" in _error(capsys, "export", "last", str(tmp_path / "x"), "--root_dir", str(tmp_path))


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in ("export", "recommend", "explain", "serve"))
    with pytest.raises(SystemExit):
        main(["recommend", "--help"])
    assert "raw item ids, oldest first" in capsys.readouterr().out


def test_serve(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    ran: list[tuple[Path, object]] = []
    monkeypatch.setattr("lightning_rec.serve.server.run", lambda folder, settings: ran.append((Path(folder), settings)))
    main(["serve", str(artefact), "--settings.port", "9000", "--settings.store", "memory:"])
    (folder, settings), *_ = ran
    assert folder == artefact
    assert (settings.port, settings.store, settings.host) == (9000, "memory:", "127.0.0.1")
