"""From a fitted run to an artefact, for every tower, and what a failed or a second export leaves."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

from lightning_rec.cli import main
from lightning_rec.recommend import export as export_module
from lightning_rec.recommend import publish
from lightning_rec.recommend.artefact import Artefact, ArtefactError
from lightning_rec.recommend.export import export
from lightning_rec.recommend.fitted import open_run
from lightning_rec.recommend.types import RequestError
from lightning_rec.recommend.vectors import VECTORS, pack, unpack

TESTS = Path(__file__).parent.parent
CONFIGS = sorted(
    path.stem for path in (TESTS / "configs").glob("*.yaml") if "SHOP" in path.read_text() and path.stem != "gbce"
)
OWN_MODEL = {"language_model: shared": "language_model: TINY_GPT2, projection: mlp"}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(artefact: Artefact, checkpoint: Path, tolerance: float = 1e-6) -> None:
    """The artefact has the vectors and interests of the run."""
    fitted = open_run(checkpoint)
    module = fitted.module
    with torch.no_grad():
        raw = module.encode_catalogue()
        assert artefact.ids == fitted.data.catalogue.ids
        torch.testing.assert_close(artefact.raw_vectors[1:], raw[1:], atol=tolerance, rtol=0)
        torch.testing.assert_close(artefact.vectors[1:], module.score.items(raw)[1:], atol=tolerance, rtol=0)
        torch.testing.assert_close(artefact.ready(artefact.raw_vectors)[1:], artefact.vectors[1:])
        assert not artefact.raw_vectors[0].any()
        assert not artefact.vectors[0].any()
        for batch in fitted.data.test_dataloader():
            wanted = module.score.interest(module.user_tower(batch.users, raw)).float()
            found = artefact.interests(batch.users)
            assert found.shape == wanted.shape
            real = batch.users.mask if found.shape[1] == batch.users.history.shape[1] else slice(None)
            torch.testing.assert_close(found[real], wanted[real], atol=tolerance, rtol=0)
            assert torch.equal(artefact.knows(batch.users), module.user_tower.knows(batch.users))
        if artefact.has_text_tower:
            tower = module.item_tower
            texts = [*artefact.texts[1:4], "a new red shoe", ""]
            torch.testing.assert_close(artefact.encode_texts(texts), tower.encode_texts(texts), atol=tolerance, rtol=0)
    assert torch.equal(artefact.counts, module.train_counts)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tower_comes_back_as_it_was(name, artefact_of, run_of):
    artefact = Artefact.read(artefact_of(name))
    assert_same(artefact, run_of(name))
    assert artefact.texts[1].startswith("Green tea")
    assert artefact.display[1] == "Green tea"
    assert artefact.item_text({field: column[1] for field, column in artefact.attributes.items()}) == artefact.texts[1]
    manifest = artefact.manifest
    assert manifest.filter_seen is (name != "global_time")
    assert ("seen items kept" if name == "global_time" else "seen items filtered") in manifest.protocol
    assert manifest.metrics == {}
    if not artefact.has_text_tower:
        with pytest.raises(RequestError, match="reads no text") as caught:
            artefact.encode_texts(["red shoe"])
        assert caught.value.code == "no_text_tower"


def test_a_user_tower_with_a_language_model_of_its_own(run_of, tmp_path):
    checkpoint = run_of("language_user", OWN_MODEL)
    export(checkpoint, tmp_path / "out", progress=False)
    artefact = Artefact.read(tmp_path / "out")
    assert set(artefact.manifest.language_models) == {"language_model", "user_language_model"}
    assert_same(artefact, checkpoint)


def test_no_language_model_is_loaded_where_none_is_needed(artefact_of, monkeypatch):
    folder = artefact_of("lora_batch")
    with monkeypatch.context() as patch:
        patch.setattr("lightning_rec.towers.item.TextEncoder", None)
        artefact = Artefact.read(folder)
        rows = torch.tensor([[1, 2]])
        from lightning_rec.data.batch import UserBatch

        assert artefact.interests(UserBatch(rows, torch.tensor([2]), torch.tensor([0]))).shape == (1, 2, 16)
    assert artefact.encode_texts(["red shoe"]).shape == (1, 16)


def test_it_works_without_data_run_and_cache(tmp_path, tiny_bert, monkeypatch):
    shop, model = tmp_path / "there" / "shop", tmp_path / "there" / "bert"
    shutil.copytree(TESTS / "data" / "files" / "shop", shop)
    shutil.copytree(tiny_bert, model)
    monkeypatch.setenv("LIGHTNING_REC_CACHE", str(tmp_path / "there" / "cache"))
    monkeypatch.chdir(tmp_path / "there")
    text = (TESTS / "configs" / "language_user.yaml").read_text()
    Path("given.yaml").write_text(text.replace("SHOP", "shop").replace("TINY_BERT", "bert"))
    main(["fit", "--config", "given.yaml", "--trainer.max_epochs", "1"])
    checkpoint = next(Path().rglob("last.ckpt"))
    export(checkpoint, "artefact", progress=False)
    before = Artefact.read("artefact").encode_texts(["red shoe", "a book of love"])
    monkeypatch.chdir(tmp_path)
    shutil.move(tmp_path / "there" / "artefact", tmp_path / "moved")
    shutil.rmtree(tmp_path / "there")
    artefact = Artefact.read(tmp_path / "moved")
    assert torch.equal(artefact.encode_texts(["red shoe", "a book of love"]), before)
    written = (tmp_path / "moved" / "manifest.json").read_text()
    assert str(tmp_path) not in written, "an artefact does not tell where it was made"


def test_test_metrics_are_those_of_the_exported_checkpoint(run_of, tmp_path):
    checkpoint = run_of("rating")
    assert export(checkpoint, tmp_path / "out", progress=False).metrics == {}
    main(["test", "--ckpt_path", str(checkpoint)])
    result = json.loads((checkpoint.parent.parent / "test_metrics.json").read_text())
    assert export(checkpoint, tmp_path / "out", progress=False).metrics == pytest.approx(result["metrics"])
    other = next(path for path in checkpoint.parent.glob("*.ckpt") if path.name != "last.ckpt")
    assert export(other, tmp_path / "out", progress=False).metrics == {}
    (checkpoint.parent.parent / "test_metrics.json").unlink()


# ---------------------------------------------------------------------------------------------- vectors


def test_small_vectors_and_what_they_cost(run_of, tmp_path, caplog):
    sizes, ndcg = {}, {}
    for dtype in ("float32", "float16", "int8"):
        manifest = export(run_of("id_sequence"), tmp_path / dtype, vectors=dtype, progress=False)
        sizes[dtype] = (tmp_path / dtype / VECTORS).stat().st_size
        ndcg[dtype] = manifest.vector_loss
        assert manifest.dtype == dtype
    assert 31 * 16 * 4 <= sizes["float32"] < 31 * 16 * 4 + 200
    assert 31 * 16 * 2 <= sizes["float16"] < 31 * 16 * 2 + 200
    assert 31 * (16 + 4) <= sizes["int8"] < 31 * (16 + 4) + 300
    assert ndcg["float32"] is None
    for dtype in ("float16", "int8"):
        assert f"Item vectors as {dtype}: test NDCG@10 {ndcg[dtype]['stored']:.4f}, with float32" in caplog.text
    exact, half, whole = (Artefact.read(tmp_path / name).vectors for name in sizes)
    assert (half - exact).abs().max() < 1e-3 * exact.abs().max()
    scale = exact.abs().amax(1, keepdim=True) / 127
    assert bool(((whole - exact).abs() <= scale / 2 + 1e-7).all())
    # the loss is that of the run's own test
    main(["test", "--ckpt_path", str(run_of("id_sequence"))])
    result = run_of("id_sequence").parent.parent / "test_metrics.json"
    measured = json.loads(result.read_text())["metrics"]["test/ndcg@10"]
    result.unlink()
    for dtype in ("float16", "int8"):
        assert ndcg[dtype]["float32"] == pytest.approx(measured, abs=1e-6)
        assert ndcg[dtype]["stored"] == pytest.approx(measured, abs=0.1)


def test_packed_vectors():
    vectors = torch.randn(50, 7) * torch.logspace(-6, 6, 50)[:, None]
    vectors[0] = 0
    back = unpack(pack(vectors, "int8"))
    assert bool(((back - vectors).abs() <= vectors.abs().amax(1, keepdim=True) / 127 * 0.501).all())
    assert torch.equal(unpack(pack(vectors, "float32")), vectors)
    with pytest.raises(ValueError, match="float16 ends at 65504"):
        pack(torch.full((1, 1), 1e5), "float16")
    with pytest.raises(ValueError, match="diverged"):
        pack(torch.full((1, 1), float("nan")), "float32")


# ---------------------------------------------------------------------------------------------- language models


def hidden(model: torch.nn.Module, folder: Path, text: str) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(tokens["input_ids"]).last_hidden_state.mean(1)


def test_the_adapter_is_a_folder_that_peft_loads(run_of, artefact_of):
    folder = artefact_of("lora_batch")
    assert Artefact.read(folder).manifest.parts["adapter"] == {"kind": "adapter", "of": "language_model"}
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(folder / "language_model"), folder / "adapter")
    encoder = open_run(run_of("lora_batch")).module.item_tower.encoder
    plain = hidden(AutoModel.from_pretrained(folder / "language_model"), folder / "language_model", "red shoe")
    tuned = hidden(model, folder / "language_model", "red shoe")
    torch.testing.assert_close(tuned, encoder.encode(["red shoe"]), atol=1e-5, rtol=0)
    assert (tuned - plain).abs().max() > 1e-4, "the adapter has learned something"


def test_a_merged_adapter(run_of, tmp_path):
    export(run_of("lora_batch"), tmp_path / "out", merge=True, progress=False)
    artefact = Artefact.read(tmp_path / "out")
    assert artefact.manifest.language_models["language_model"]["merged"]
    assert "adapter" in artefact.manifest.parts, "the adapter lies beside the merged model all the same"
    assert_same(artefact, run_of("lora_batch"), tolerance=1e-5)
    encoder = open_run(run_of("lora_batch")).module.item_tower.encoder
    folder = tmp_path / "out" / "language_model"
    merged = hidden(AutoModel.from_pretrained(folder), folder, "red shoe")
    torch.testing.assert_close(merged, encoder.encode(["red shoe"]), atol=1e-5, rtol=0)


def test_merge_needs_an_adapter(run_of, tmp_path):
    with pytest.raises(ValueError, match="this run has none"):
        export(run_of("text_pooled"), tmp_path / "out", merge=True, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_model_tuned_whole_is_in_its_folder(run_of, artefact_of):
    folder = artefact_of("gpt2_full") / "language_model"
    encoder = open_run(run_of("gpt2_full")).module.item_tower.encoder
    tokens = AutoTokenizer.from_pretrained(folder)("red shoe", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        last = AutoModel.from_pretrained(folder).eval()(tokens).last_hidden_state[:, -1]
    torch.testing.assert_close(last, encoder.encode(["red shoe"]), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- one folder, whole


def test_a_second_export_replaces_the_first_whole(run_of, artefact_of):
    folder = artefact_of("lora_batch")
    export(run_of("id_sequence"), folder, progress=False)
    assert not (folder / "language_model").exists()
    assert_same(Artefact.read(folder), run_of("id_sequence"))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def _fail(*args, **kwargs):
    raise OSError("the disk is full")


@pytest.mark.parametrize("place", ["write_towers", "write_vectors", "file_digest", "Manifest", "_sync", "_replace"])
def test_a_crash_leaves_the_old_one_whole(place, run_of, artefact_of, monkeypatch):
    folder = artefact_of("text_pooled")
    before = files(folder)
    monkeypatch.setattr(publish if place.startswith("_") else export_module, place, _fail)
    with pytest.raises(OSError, match="the disk is full"):
        export(run_of("id_sequence"), folder, progress=False)
    assert files(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    Artefact.read(folder)


def test_without_an_exchange_the_old_one_is_moved_aside(run_of, artefact_of, monkeypatch):
    monkeypatch.setattr(publish, "_exchange", lambda one, other: False)
    folder = artefact_of("text_pooled")
    export(run_of("id_sequence"), folder, progress=False)
    assert_same(Artefact.read(folder), run_of("id_sequence"))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    before, rename = files(folder), publish.os.rename

    def once(source, target):
        if Path(target) == folder and str(source).endswith(".part"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(publish.os, "rename", once)
    with pytest.raises(OSError, match="no"):
        export(run_of("id_sequence"), folder, progress=False)
    assert files(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_is_no_artefact_is_not_replaced(run_of, artefact_of, tmp_path):
    checkpoint = run_of("id_sequence")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtefactError, match="exists and is no folder"):
        export(checkpoint, tmp_path / "file", progress=False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    with pytest.raises(ArtefactError, match="exists and is no artefact"):
        export(checkpoint, tmp_path / "folder", progress=False)
    folder = artefact_of("text_pooled")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtefactError, match=r"notes\.txt is no part of the artefact"):
        export(checkpoint, folder, progress=False)
    assert (tmp_path / "folder" / "thesis.tex").read_text() == (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(checkpoint, tmp_path / "empty", progress=False)
    Artefact.read(tmp_path / "empty")


def test_further_parts(run_of, tmp_path):
    def writer(fitted, folder):
        (folder / "extra").mkdir()
        (folder / "extra" / "rows.txt").write_text(str(fitted.module.n_rows))
        return "extra", {"kind": "extra", "lazy": True}

    export(run_of("id_sequence"), tmp_path / "out", parts=[writer], progress=False)
    artefact = Artefact.read(tmp_path / "out")
    assert (artefact.part("extra") / "rows.txt").read_text() == "31"
    with pytest.raises(ArtefactError, match="has no part 'other'"):
        artefact.part("other")
    (tmp_path / "out" / "extra" / "rows.txt").write_text("32")
    with pytest.raises(ArtefactError, match=r"rows\.txt was altered"):
        Artefact.read(tmp_path / "out").part("extra")


# ---------------------------------------------------------------------------------------------- runs and users


def test_users_may_be_left_out(run_of, tmp_path):
    export(run_of("id_sequence"), tmp_path / "out", users=False, progress=False)
    assert Artefact.read(tmp_path / "out").users is None
    assert b"u001" not in b"".join(files(tmp_path / "out").values())
    with pytest.warns(UserWarning, match="has a vector for each user"):
        export(run_of("matrix_factorisation"), tmp_path / "out", users=False, progress=False)


def test_towers_of_ones_own(run_of, tmp_path, monkeypatch):
    (tmp_path / "shop_towers.py").write_text(
        "from torch import nn\nfrom lightning_rec.towers import ItemTower\n"
        "class Hashed(ItemTower):\n"
        "    def __init__(self, dim: int = 8, buckets: int = 5) -> None:\n"
        "        super().__init__()\n        self.dim, self.buckets = dim, buckets\n"
        "    def configure(self, catalogue):\n        self.table = nn.Embedding(self.buckets, self.dim)\n"
        "    def forward(self, items):\n        return self.table(items.rows % self.buckets)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    change = {"lightning_rec.towers.IdItemTower, init_args: {dim: 16}": "shop_towers.Hashed, init_args: {dim: 12}"}
    checkpoint = run_of("id_sequence", change)
    export(checkpoint, tmp_path / "out", progress=False)
    assert_same(Artefact.read(tmp_path / "out"), checkpoint)
    sys.modules.pop("shop_towers")
    (tmp_path / "shop_towers.py").unlink()
    artefact = Artefact.read(tmp_path / "out")  # its vectors are at hand: the class is not needed
    with pytest.raises(ArtefactError, match=r"shop_towers\.Hashed, which cannot be imported .* PYTHONPATH"):
        artefact.item_tower  # noqa: B018  # a property that builds


def test_a_run_without_config_and_one_of_impressions(run_of, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        export(tmp_path / "none.ckpt", tmp_path / "out")
    checkpoint = run_of("id_sequence")
    alone = Path(shutil.copy(checkpoint, tmp_path))
    export(alone, tmp_path / "out", progress=False)  # the checkpoint itself says how it was made
    assert_same(Artefact.read(tmp_path / "out"), checkpoint)
    config = yaml.safe_load((checkpoint.parent.parent / "config.yaml").read_text())
    config["model"] = {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel", "init_args": {}}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    moved = Path(shutil.copy(checkpoint, tmp_path / "run" / "checkpoints"))
    with pytest.raises(ArtefactError, match="BoringModel over EcommerceDataModule cannot be exported"):
        export(moved, tmp_path / "out")
