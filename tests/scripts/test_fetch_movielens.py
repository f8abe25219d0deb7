"""The fetcher, on invented archives: what it converts, what it refuses, and that it writes all or nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import zipfile
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[2] / "scripts" / "fetch_movielens.py"
_SPEC = importlib.util.spec_from_file_location("fetch_movielens", _PATH)
fetcher = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fetcher)

FLAGS = "0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0"
NONE = "|".join(["1"] + ["0"] * 18)
ORIGINAL = {
    "u.data": b"7\t1\t5\t881250949\n7\t3\t2\t881250950\n",
    "u.item": (
        f"1|Nénette (La petite) (1995)|01-Jan-1995||http://example.org/a|{FLAGS}\n"
        f"2|Giving, The (1995) (V)|01-Jan-1995||http://example.org/b|{FLAGS}\n"
        f"3|unknown||||{NONE}\n"
    ).encode("latin-1"),
    "u.user": b"7|24|M|writer|00123\n",
}
TABLES = {
    "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "7\t1\t5\t881250949\n7\t3\t2\t881250950\n",
    "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "1\tNénette (La petite)\t1995\tAnimation Children's Comedy\n"
    "2\tGiving, The (1995)\tV\tAnimation Children's Comedy\n"
    "3\tunkonwn\tunkonwn\tunknown\n",
    "ml-100k.user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    "7\t24\tM\twriter\t00123\n",
}


def zipped(files: dict[str, bytes]) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return written.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The invented tables stand for the published ones."""
    tables = {name: text.encode() for name, text in TABLES.items()}
    monkeypatch.setattr(fetcher, "TABLES", {name: digest(content) for name, content in tables.items()})
    return tables


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(fetcher.urllib.request, "urlopen", refuse)


def fake_pip(monkeypatch: pytest.MonkeyPatch, wheel: bytes | None) -> list[list[str]]:
    """pip download writes this wheel (or fails); the commands it was called with are returned."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> object:
        calls.append(command)
        if wheel is not None:
            folder = Path(command[command.index("-d") + 1])
            (folder / "recbole-1.2.1-py3-none-any.whl").write_bytes(wheel)
        return fetcher.subprocess.CompletedProcess(command, wheel is None, "", "ERROR: no matching distribution")

    monkeypatch.setattr(fetcher.subprocess, "run", run)
    return calls


def test_the_archive_of_grouplens_becomes_the_tables(published: dict[str, bytes]) -> None:
    files = fetcher.members(zipped({f"ml-100k/{name}": content for name, content in ORIGINAL.items()}), "ml-100k/")
    assert fetcher.convert(files) == published


def test_both_sources_give_the_same_folder(published, monkeypatch, tmp_path, capsys) -> None:
    archive = zipped({f"ml-100k/{name}": content for name, content in ORIGINAL.items()})
    wheel = zipped({fetcher.WHEEL_FOLDER + name: content for name, content in published.items()})
    monkeypatch.setattr(fetcher, "ARCHIVE_SHA256", digest(archive))
    monkeypatch.setattr(fetcher, "WHEEL_SHA256", digest(wheel))
    monkeypatch.setattr(fetcher.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(archive))
    calls = fake_pip(monkeypatch, wheel)

    assert fetcher.main(["--cache", str(tmp_path / "one")]) == 0
    assert not calls
    monkeypatch.setattr(fetcher.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"<html>sign in</html>"))
    assert fetcher.main(["--cache", str(tmp_path / "two")]) == 0
    assert "--no-deps" in calls[0]
    assert "recbole==1.2.1" in calls[0]

    answer = capsys.readouterr()
    assert answer.out.splitlines() == [str(tmp_path / "one" / "ml-100k"), str(tmp_path / "two" / "ml-100k")]
    assert "GroupLens" in answer.err
    assert "redistribute" in answer.err
    for folder in ("one", "two"):
        found = {path.name: path.read_bytes() for path in (tmp_path / folder / "ml-100k").iterdir()}
        assert found == published
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["ml-100k"]


def test_a_second_run_reuses_the_cache_and_mends_it(published, unreachable, monkeypatch, tmp_path, capsys) -> None:
    wheel = zipped({fetcher.WHEEL_FOLDER + name: content for name, content in published.items()})
    monkeypatch.setattr(fetcher, "WHEEL_SHA256", digest(wheel))
    calls = fake_pip(monkeypatch, wheel)
    monkeypatch.setenv("LIGHTNING_REC_CACHE", str(tmp_path))
    assert fetcher.main([]) == 0
    assert fetcher.main([]) == 0
    assert len(calls) == 1
    (tmp_path / "ml-100k" / "ml-100k.user").write_bytes(b"something else")
    assert fetcher.main([]) == 0
    assert len(calls) == 2
    assert (tmp_path / "ml-100k" / "ml-100k.user").read_bytes() == published["ml-100k.user"]
    assert "is not the published file: fetching it again" in capsys.readouterr().err


def test_a_tampered_wheel_is_refused(published, unreachable, monkeypatch, tmp_path, capsys) -> None:
    fake_pip(monkeypatch, zipped({fetcher.WHEEL_FOLDER + name: content for name, content in published.items()}))
    assert fetcher.main(["--cache", str(tmp_path)]) == 1
    answer = capsys.readouterr()
    assert answer.out == ""
    assert "it is not the published file" in answer.err
    assert "--data DIR" in answer.err
    assert list(tmp_path.iterdir()) == []


def test_a_tampered_table_is_refused(published, unreachable, monkeypatch, tmp_path, capsys) -> None:
    published["ml-100k.item"] += b"4\tSmuggled in\t1999\tDrama\n"
    wheel = zipped({fetcher.WHEEL_FOLDER + name: content for name, content in published.items()})
    monkeypatch.setattr(fetcher, "WHEEL_SHA256", digest(wheel))
    fake_pip(monkeypatch, wheel)
    assert fetcher.main(["--cache", str(tmp_path)]) == 1
    assert "ml-100k.item has the sha256" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_reachable_names_every_reason(unreachable, monkeypatch, tmp_path, capsys) -> None:
    fake_pip(monkeypatch, None)
    assert fetcher.main(["--cache", str(tmp_path)]) == 1
    answer = capsys.readouterr().err
    assert "Name or service not known" in answer
    assert "no matching distribution" in answer


@pytest.mark.parametrize("name", ["../evil", "ml-100k/../../evil", "/etc/evil", "ml-100k\\..\\..\\evil", "C:\\evil"])
def test_a_path_that_leads_out_is_refused(name: str) -> None:
    with pytest.raises(fetcher.FetchError, match="leads out of its folder"):
        fetcher.members(zipped({name: b"", "ml-100k/u.data": b""}), "ml-100k/")


def test_only_files_right_inside_the_folder_are_read() -> None:
    archive = zipped({"ml-100k/u.data": b"1", "ml-100k/deep/u.item": b"2", "other/u.user": b"3"})
    assert fetcher.members(archive, "ml-100k/") == {"u.data": b"1"}


def test_a_copy_of_the_user_is_taken_as_it_is(unreachable, tmp_path, capsys) -> None:
    for form in (ORIGINAL, TABLES):
        inner = tmp_path / str(len(list(tmp_path.iterdir()))) / "ml-100k"
        inner.mkdir(parents=True)
        for name in form:
            (inner / name).write_bytes(b"")
        for named in (inner, inner.parent):
            assert fetcher.main(["--data", str(named)]) == 0
            assert capsys.readouterr().out.strip() == str(inner)
    assert fetcher.main(["--data", str(tmp_path)]) == 1
    assert "name the folder that ml-100k.zip unpacks to" in capsys.readouterr().err


def test_an_archive_that_lacks_a_file_is_named() -> None:
    with pytest.raises(fetcher.FetchError, match=r"lacks u\.item, u\.user"):
        fetcher.convert({"u.data": b""})
