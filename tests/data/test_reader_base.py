"""The reader contract: the example of its docstring, and plain values in YAML."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import jsonargparse
import pytest

from lightning_rec.data.readers import Reader


def test_the_example_in_the_docstring_runs(tmp_path: Path) -> None:
    text = inspect.getdoc(Reader)
    assert text is not None
    code = textwrap.dedent(text.split("::\n", 1)[1].split("\nName it", 1)[0])
    space: dict = {}
    exec(code, space)  # the text of our own docstring
    path = tmp_path / "plays.log"
    path.write_text("1400000000 ann s1\n1400000001 bob s2\n")
    reader = space["PlayLog"](str(path))
    raw = reader.read()
    assert raw.interactions[1] == {"timestamp": 1400000001, "user_id": "bob", "item_id": "s2"}
    assert raw.report.rows == {"interactions": 2}
    assert "Read 2 interactions." in str(raw.report)
    assert reader.paths() == [str(path)]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Files", "{interactions: log.csv, items: [a.csv, b.csv], interaction_columns: {user_id: email, item_id: 1}}"),
        (
            "Files",
            "{interactions: [log.csv], item_columns: {title: [name, title]}, rating_range: [1, 5], on_bad_rows: skip}",
        ),
        ("MovieLens", "{path: ml, tags: true, overviews: tmdb.csv.gz}"),
        ("AmazonReviews", "{reviews: [a.jsonl.gz], metadata: m.jsonl.gz}"),
        ("SequenceFiles", "{interactions: log.txt}"),
        ("HubDataset", "{interactions: owner/name, split: train, item_columns: {title: name}}"),
    ],
)
def test_readers_come_from_yaml_with_documented_options(name: str, arguments: str) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Reader, "reader")
    config = f"{{class_path: lightning_rec.data.readers.{name}, init_args: {arguments}}}"
    reader = parser.instantiate(parser.parse_args([f"--reader={config}"])).reader
    assert type(reader).__name__ == name
    documented = inspect.getdoc(type(reader)) or ""
    for argument in inspect.signature(type(reader)).parameters:
        assert f"\n    {argument}: " in documented, argument
