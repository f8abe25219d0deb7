"""A run that begins with the towers of another: text carries over whole, vectors of ids do not."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch
from lightning import Trainer, seed_everything

from lightning_rec import EcommerceDataModule, ImpressionTwoTower, NewsImpressionDataModule, TwoTower
from lightning_rec.data.readers import Files
from lightning_rec.objectives import Softmax
from lightning_rec.towers import (
    IdItemTower,
    NewsItemTower,
    NRMSUserTower,
    SequenceUserTower,
    TextIdItemTower,
    TextItemTower,
)
from lightning_rec.towers.age import AgeBias
from lightning_rec.towers.score import Cosine
from lightning_rec.towers.word_vectors import WordOptions

FILES = Path(__file__).parent / "data" / "files"
SHOP, MIND = FILES / "shop", FILES / "mind"


def data(folder: Path | None = None) -> EcommerceDataModule:
    """The shop, or another whose items have other ids."""
    log, items = SHOP / "interactions.csv", SHOP / "items.csv"
    if folder is not None:
        for source in (log, items):
            rows = list(csv.DictReader(source.open()))
            with (folder / source.name).open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows([row | {"item_id": f"film-{row['item_id']}"} for row in rows[:-4]])
        log, items = folder / log.name, folder / items.name
    return EcommerceDataModule(Files(str(log), str(items)), min_rating=0, batch_size=10, max_history=8)


def two_towers(model: str, kind: str = "text", dim: int = 8, **options: object) -> TwoTower:
    seed_everything(len(options), verbose=False)
    tower = {
        "text": lambda: TextItemTower(model, dim=dim),
        "both": lambda: TextIdItemTower(model, dim=dim),
        "id": lambda: IdItemTower(dim=dim),
    }[kind]()
    return TwoTower(tower, SequenceUserTower(blocks=1, heads=2, max_length=8), Softmax(), Cosine(0.1, True), **options)


def trainer(folder: Path, epochs: int = 1) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def fitted(folder: Path, model: str, kind: str) -> tuple[str, TwoTower]:
    module, run = two_towers(model, kind), trainer(folder)
    run.fit(module, data())
    path = str(folder / f"{kind}.ckpt")
    run.save_checkpoint(path)
    return path, module


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str) -> dict[str, tuple[str, TwoTower]]:
    folder = tmp_path_factory.mktemp("source")
    return {kind: fitted(folder, tiny_bert, kind) for kind in ("text", "both", "id")}


def begun(module: TwoTower, chosen: EcommerceDataModule, folder: Path) -> TwoTower:
    trainer(folder).validate(module, chosen, verbose=False)
    return module


def differing(first: TwoTower, second: TwoTower) -> set[str]:
    one, other = first.state_dict(), second.state_dict()
    names = {name for name in one if name.split(".")[0] in ("item_tower", "user_tower", "score")}
    return {name for name in names if one[name].shape != other[name].shape or not torch.equal(one[name], other[name])}


def test_text_towers_answer_for_a_catalogue_that_they_have_not_seen(source, tiny_bert, tmp_path):
    path, module = source["text"]
    assert differing(module, begun(two_towers(tiny_bert, dim=8, lr=0.1), data(), tmp_path)) != set()
    other = begun(two_towers(tiny_bert, start_from=path), data(tmp_path), tmp_path)
    assert differing(module, other) == set()
    # the same texts stand under other ids: the same vectors
    assert torch.allclose(other.encode_catalogue()[1:20], module.eval().encode_catalogue()[1:20], atol=1e-6)
    run = trainer(tmp_path)
    figures = run.test(other, data(tmp_path), verbose=False)[0]
    assert figures["test/users"] > 0
    learning = two_towers(tiny_bert, start_from=path)
    trainer(tmp_path).fit(learning, data(tmp_path))
    assert differing(module, learning) != set(), "it goes on learning"


def test_vectors_of_ids_begin_anew_where_the_ids_are_others(source, tiny_bert, tmp_path):
    path, module = source["both"]
    other = begun(two_towers(tiny_bert, "both", start_from=path), data(tmp_path), tmp_path)
    tables = differing(module, other)
    assert tables
    assert {len(other.state_dict()[name]) for name in tables} == {other.n_rows}
    same = begun(two_towers(tiny_bert, "both", start_from=path), data(), tmp_path)
    assert differing(module, same) == set(), "of the same catalogue everything is copied"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("text", {"dim": 16}, r"has the shape \(.*8.*\) in .* and \(.*16.*\) here"),
        ("text", {"start_from": "nowhere.ckpt"}, r"start_from names nowhere.ckpt, which is no file"),
    ],
)
def test_what_cannot_be_copied_is_said(source, tiny_bert, tmp_path, kind, options, message):
    module = two_towers(tiny_bert, kind, **({"start_from": source[kind][0]} | options))
    with pytest.raises((RuntimeError, FileNotFoundError), match=message):
        begun(module, data(tmp_path), tmp_path)


def test_a_file_of_something_else_is_refused(tiny_bert, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(RuntimeError, match=r"was not written by lightning_rec"):
        begun(two_towers(tiny_bert, start_from=str(tmp_path / "other.ckpt")), data(), tmp_path)


def test_a_checkpoint_of_the_run_itself_brings_all_weights(source, tiny_bert, tmp_path):
    """What the run started from may be gone when it is tested or resumed."""
    path, _ = source["text"]
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes(Path(path).read_bytes())
    module, run = two_towers(tiny_bert, start_from=str(copy)), trainer(tmp_path)
    run.fit(module, data(tmp_path))
    own = str(tmp_path / "own.ckpt")
    run.save_checkpoint(own)
    copy.unlink()
    again = two_towers(tiny_bert, start_from=str(copy))
    trainer(tmp_path).test(again, data(tmp_path), ckpt_path=own, verbose=False)
    assert differing(module, again) == set()


def test_a_newsroom_starts_from_another_by_the_names_that_both_have(tmp_path):
    def newsroom(dim: int = 8, **options: object) -> ImpressionTwoTower:
        seed_everything(len(options), verbose=False)
        tower = NewsItemTower(words=WordOptions(dim=6, encoder="mean"), dim=dim)
        return ImpressionTwoTower(tower, NRMSUserTower(heads=2), age=AgeBias(4), lr=0.05, **options)

    def log(folder: Path) -> NewsImpressionDataModule:
        return NewsImpressionDataModule(path=str(folder), batch_size=8)

    module, run = newsroom(), trainer(tmp_path)
    run.fit(module, log(MIND))
    path = str(tmp_path / "news.ckpt")
    run.save_checkpoint(path)
    other = tmp_path / "other"
    shutil.copytree(MIND, other)
    for file in other.rglob("news.tsv"):
        file.write_text(file.read_text().replace("\tsports\t", "\tcycling and rowing\t"))
    begun = newsroom(start_from=path)
    trainer(tmp_path).validate(begun, log(other), verbose=False)
    for old, new in zip(module.item_tower.name_views, begun.item_tower.name_views, strict=True):
        shared = set(old.table.rows) & set(new.table.rows)
        assert shared
        for name in shared:
            assert torch.equal(new.table.vectors[new.table.rows[name]], old.table.vectors[old.table.rows[name]])
    categories = begun.item_tower.name_views[0].table
    assert "cycling and rowing" in categories.rows
    assert "sports" not in categories.rows
    assert not categories.vectors[categories.rows["cycling and rowing"]].any(), "what is new says nothing yet"
    assert categories.vectors[1:].any()
    assert not differing(module, begun) - {
        name for name in begun.state_dict() if name.endswith((".letters", ".vectors"))
    }
    assert all(torch.equal(a, b) for a, b in zip(module.age.parameters(), begun.age.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=r"in .*news.ckpt"):
        trainer(tmp_path).validate(newsroom(16, start_from=path), log(other), verbose=False)
