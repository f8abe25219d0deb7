"""The report of the quickstart, on a few invented films."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SCRIPT = Path(__file__).parents[2] / "scripts" / "quickstart_report.py"


def test_the_report_shows_metrics_and_films(tmp_path: Path) -> None:
    data, run, baseline = tmp_path / "data", tmp_path / "run", tmp_path / "baseline"
    for folder in (data, run, baseline):
        folder.mkdir()
    (data / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t11\t4\t200\n1\t12\t5\t100\n2\t13\t3\t5\n"
    )
    (data / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        '11\tA "Film\t1990\tDrama\n12\tNénette\t1991\tWar\n13\tnull\t1992\tWar\n'
    )
    fitted = run / "lightning_logs" / "version_0"
    fitted.mkdir(parents=True)
    (fitted / "config.yaml").touch()
    about = {"protocol": "Leave-one-out, seen filtered.", "checkpoint": "best.ckpt"}
    ours = {"metrics": {"test/ndcg@10": 0.25, "test/loss": 1.0, "test/hr@5": 0.5}, **about}
    (fitted / "test_metrics.json").write_text(json.dumps(ours))
    theirs = {"metrics": {"test/hr@5": 0.125, "test/ndcg@10": 0.0625}, **about, "checkpoint": ""}
    (baseline / "test_metrics.json").write_text(json.dumps(theirs))
    rows = [("1", 2, "12", 0.5, "model"), ("1", 1, "13", 0.75, "model"), ("2", 1, "11", 3.0, "popularity")]
    columns = ("user_id", "rank", "item_id", "score", "source")
    table = pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows])
    pq.write_table(table, fitted / "predictions.parquet")

    command = [sys.executable, str(SCRIPT), "--data", str(data), "--run", str(run), "--baseline", str(baseline)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    lines = done.stdout.splitlines()
    assert "test/ndcg@10     0.2500      0.0625" in lines
    assert "test/hr@5        0.5000      0.1250" in lines
    assert "Leave-one-out, seen filtered." in lines
    assert "Checkpoint:   best.ckpt" in lines
    assert f"Predictions:  {fitted / 'predictions.parquet'}" in lines
    assert "loss" not in done.stdout
    first = lines.index("User 1 watched 2 films, the last of them:")
    assert lines[first + 1 : first + 6] == [
        "     Nénette (1991) [12], 5 stars",
        '     A "Film (1990) [11], 4 stars',
        "  Recommended:",
        "  1. null (1992) [13]",
        "  2. Nénette (1991) [12]",
    ]
    assert '  1. A "Film (1990) [11]' in lines
