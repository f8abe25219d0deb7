"""Opening an artefact: what is in it, and that nothing but what was written is believed."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_rec.data.batch import UserBatch
from lightning_rec.recommend import artefact as artefact_module
from lightning_rec.recommend.artefact import Artefact, ArtefactError
from lightning_rec.recommend.manifest import MANIFEST, Manifest
from lightning_rec.recommend.publish import new_folder
from lightning_rec.recommend.types import Event
from lightning_rec.recommend.vectors import read_vectors

FILES = [
    "manifest.json",
    "towers.safetensors",
    "item_vectors.safetensors",
    "items.parquet",
    "users.parquet",
    "language_model/config.json",
    "language_model/model.safetensors",
    "language_model/tokenizer.json",
    "language_model/tokenizer_config.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/head.safetensors",
]


def use(folder: Path) -> None:
    """Reads every file of an artefact."""
    Artefact.read(folder).encode_texts(["red shoe"])


def rewrite(folder: Path, **changes) -> None:
    """A manifest with other entries and a fitting digest, as someone who means harm would write it."""
    manifest = Manifest.from_json((folder / MANIFEST).read_bytes(), folder / MANIFEST)
    (folder / MANIFEST).write_text(replace(manifest, **changes).to_json())


def test_the_files_are_all_named(artefact_of):
    folder = artefact_of("lora_batch")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == sorted(FILES)
    manifest = Artefact.read(folder).manifest
    assert sorted(manifest.digests) == sorted(set(FILES) - {"manifest.json"})
    assert set(manifest.parts) == {"language_model", "adapter", "users"}
    assert manifest.language_models["language_model"]["tune"] == "adapter"
    assert manifest.item_tower["init_args"]["language_model"] == "artefact:language_model"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_an_altered_byte_is_named(name, place, artefact_of):
    folder = artefact_of("lora_batch")
    data = bytearray((folder / name).read_bytes())
    data[int(place * (len(data) - 2))] ^= 0x20
    (folder / name).write_bytes(data)
    with pytest.raises(ArtefactError, match=Path(name).name):
        use(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name, artefact_of):
    folder = artefact_of("lora_batch")
    (folder / name).unlink()
    with pytest.raises(ArtefactError, match=f"{Path(name).name} is missing"):
        Artefact.read(folder)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["model.pt", "language_model/pytorch_model.bin", "new/pickle.pkl"])
def test_a_foreign_file_is_named(name, verify, artefact_of):
    folder = artefact_of("lora_batch")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\x80\x04")
    with pytest.raises(ArtefactError, match=f"{Path(name).name} is foreign"):
        Artefact.read(folder, verify=verify)


def test_links_are_refused(artefact_of, tmp_path):
    folder = artefact_of("lora_batch")
    (folder / "elsewhere").symlink_to(tmp_path)
    with pytest.raises(ArtefactError, match="elsewhere is foreign"):
        Artefact.read(folder)
    (folder / "elsewhere").unlink()
    shutil.move(folder / "items.parquet", tmp_path / "items.parquet")
    (folder / "items.parquet").symlink_to(tmp_path / "items.parquet")
    with pytest.raises(ArtefactError, match=r"items\.parquet is a link"):
        Artefact.read(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "./items.parquet", "a//b", "c:\\x", "", "."])
def test_paths_that_lead_out_are_refused(name, artefact_of):
    folder = artefact_of("text_pooled")
    manifest = Artefact.read(folder).manifest
    (folder / MANIFEST).write_text(replace(manifest, digests={**manifest.digests, name: "0" * 64}).to_json())
    with pytest.raises(ArtefactError, match="may lead out of the artefact"):
        Artefact.read(folder)
    (folder / MANIFEST).write_text(replace(manifest, parts={name: {"kind": "language_model"}}).to_json())
    with pytest.raises(ArtefactError, match="may lead out of the artefact"):
        Artefact.read(folder)


def test_a_language_model_from_elsewhere_is_refused(artefact_of):
    folder = artefact_of("text_pooled")
    tower = Artefact.read(folder).manifest.item_tower
    rewrite(folder, item_tower={**tower, "init_args": {**tower["init_args"], "language_model": "artefact:../else"}})
    with pytest.raises(ArtefactError, match=r"has no language model '\.\./else'"):
        use(folder)


def test_another_version_is_refused_with_the_remedy(artefact_of):
    folder = artefact_of("text_pooled")
    content = json.loads((folder / MANIFEST).read_text())
    for version, remedy in ((2, "update lightning_rec"), (0, "export the run again"), (None, "export the run again")):
        (folder / MANIFEST).write_text(json.dumps({**content, "format_version": version}))
        with pytest.raises(ArtefactError, match=f"format version {version}.*{remedy}"):
            Artefact.read(folder)


def test_what_is_no_artefact(tmp_path):
    with pytest.raises(ArtefactError, match="is no artefact: give a folder that `lightning-rec export` wrote"):
        Artefact.read(tmp_path / "nowhere")
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ArtefactError, match="is not the manifest of an artefact"):
        Artefact.read(tmp_path)
    (tmp_path / MANIFEST).write_text("[1")
    with pytest.raises(ArtefactError, match="is no JSON"):
        Artefact.read(tmp_path)


def test_only_towers_are_made(artefact_of):
    folder = artefact_of("id_sequence")
    for class_path, message in (
        ("subprocess.Popen", "which is no UserTower"),
        ("lightning_rec.towers.IdItemTower", "which is no UserTower"),
        ("not_here.Tower", "cannot be imported .* PYTHONPATH"),
        ("lightning_rec.towers.Missing", "cannot be imported"),
        ("Tower", "cannot be imported"),
    ):
        rewrite(folder, user_tower={"class_path": class_path, "init_args": {}})
        with pytest.raises(ArtefactError, match=message):
            Artefact.read(folder)
    rewrite(folder, user_tower={"class_path": "lightning_rec.towers.SequenceUserTower", "init_args": {"blokcs": 1}})
    with pytest.raises(ArtefactError, match="does not take the arguments"):
        Artefact.read(folder)
    rewrite(folder, user_tower={"class_path": "lightning_rec.towers.SequenceUserTower", "init_args": {"blocks": 2}})
    with pytest.raises(ArtefactError, match="does not fit the user tower"):
        Artefact.read(folder)


def test_a_replaced_artefact_is_read_anew(artefact_of, monkeypatch):
    folder, other = artefact_of("text_pooled"), artefact_of("id_sequence")
    real, swaps = artefact_module.check_names, []

    def swapping(path, manifest):
        if not swaps:
            swaps.append(path)
            shutil.rmtree(folder)
            other.rename(folder)
        real(path, manifest)

    monkeypatch.setattr(artefact_module, "check_names", swapping)
    assert Artefact.read(folder).manifest.item_tower["class_path"].endswith("IdItemTower")


def test_a_language_model_of_a_newer_artefact_is_not_taken(artefact_of):
    folder, other = artefact_of("text_pooled"), artefact_of("text_id_gate")
    opened = Artefact.read(folder)
    shutil.rmtree(folder)
    other.rename(folder)
    with pytest.raises(ArtefactError, match="was replaced by another export since it was opened"):
        opened.encode_texts(["red shoe"])


# ---------------------------------------------------------------------------------------------- what is in it


def test_a_link_to_an_artefact_can_be_opened(artefact_of, tmp_path, monkeypatch):
    (tmp_path / "current").symlink_to(artefact_of("id_sequence"))
    monkeypatch.chdir(tmp_path)
    assert Artefact.read("current").ids[0] == ""


def test_items(artefact):
    assert artefact.ids[:2] == ["", "t00"]
    assert len(artefact.ids) == len(artefact.texts) == len(artefact.display) == len(artefact.counts) == 31
    assert artefact.manifest.n_items == 30
    assert set(artefact.attributes) == {"title", "categories", "description"}
    assert artefact.attributes["title"][:2] == [None, "Green tea"]
    with pytest.raises(KeyError):
        artefact.attributes["colour"]
    assert artefact.item_text({"title": "Tea &amp; <b>milk</b>", "unknown": "x"}) == "Tea & milk"
    assert artefact.item_text({}) == ""
    assert artefact.vectors[1:].norm(dim=1).sub(1).abs().max() < 1e-5, "a cosine score makes unit vectors"


def test_interests_from_another_table_of_vectors(artefact):
    users = UserBatch(torch.tensor([[1, 2], [2, 0]]), torch.tensor([2, 1]), torch.tensor([0, 0]))
    table = artefact.raw_vectors[[0, 5, 7]]
    whole = UserBatch(torch.tensor([[5, 7], [7, 0]]), users.lengths, users.users)
    found, wanted = artefact.interests(users, table), artefact.interests(whole)
    torch.testing.assert_close(found[users.mask], wanted[users.mask])


def test_towers_built_while_answering_can_be_differentiated(artefact):
    with torch.inference_mode():
        artefact.encode_texts(["red shoe"])
    for module in (artefact.item_tower, artefact.user_tower):
        assert not module.training
        assert not any(parameter.requires_grad or parameter.is_inference() for parameter in module.parameters())
    raw = artefact.raw_vectors[1:3].clone().requires_grad_()
    artefact.ready(raw).sum().backward()
    assert raw.grad is not None


def test_users(artefact):
    users = artefact.users
    assert len(users) == 40
    assert users.ids[0] == "u001"
    assert users.row("u001") == 1
    assert users.row("nobody") == 0
    assert users.history("nobody", 5) == []
    history = users.history("u001", 100)
    assert users.history("u001", 2) == history[-2:]
    assert users.history("u001", 0) == []
    assert history[0] == Event("l05", 1600000000)
    assert [event.time for event in history] == sorted(event.time for event in history)
    assert users.sample(2) == ["u001", "u002"]
    users.forget("u001")
    assert users.row("u001") == 0
    assert users.history("u001", 5) == []
    assert users.sample(1) == ["u002"]


def test_user_texts(artefact_of):
    artefact = Artefact.read(artefact_of("language_user"))
    assert artefact.reads_user_text
    assert artefact.user_text(["Green tea", "Boots"]) == "Likes Boots, Green tea"
    assert artefact.user_text(["Green tea"], user="u001").startswith("Lund, 20. Likes Green tea")
    assert "Says: " in artefact.user_text(["Green tea"], user="u001")
    assert artefact.user_text([], user="nobody") == ""
    assert not Artefact.read(artefact_of("id_sequence")).reads_user_text
    assert Artefact.read(artefact_of("id_sequence")).user_text(["Green tea"]) == ""


def test_readers_see_one_or_the_other_while_artefacts_are_swapped(artefact_of):
    place, other = artefact_of("id_sequence"), artefact_of("global_time")
    wanted = {}
    for folder in (place, other):
        opened = Artefact.read(folder)
        wanted[opened.manifest.protocol] = opened.vectors
    assert len(wanted) == 2
    sources = [shutil.copytree(folder, folder.with_name(f"source_{folder.name}")) for folder in (other, place)]
    found: list[Artefact | Exception] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                found.append(Artefact.read(place))
            except Exception as error:
                found.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for turn in range(12):
        with new_folder(place) as new:
            shutil.copytree(sources[turn % 2], new, dirs_exist_ok=True)
        time.sleep(0.05)
    done.set()
    thread.join()
    assert len(found) > 3
    for opened in found:
        assert isinstance(opened, Artefact), opened
        assert torch.equal(opened.vectors, wanted[opened.manifest.protocol])


@pytest.mark.parametrize("verify", [True, False])
def test_replaced_and_put_back_while_it_is_read(artefact_of, monkeypatch, verify):
    """The same export again is not the one that the first files came from."""
    place, other = artefact_of("id_sequence"), artefact_of("global_time")
    wanted = Artefact.read(place).vectors
    original = shutil.copytree(place, place.with_name("original"))
    swaps = []

    def put(source):
        with new_folder(place) as new:
            shutil.copytree(source, new, dirs_exist_ok=True)

    def vectors(folder):
        if swaps:
            return read_vectors(folder)
        swaps.append(put(other))  # all other files, and the manifest, were read and are there again afterwards
        found = read_vectors(folder)
        swaps.append(put(original))
        return found

    monkeypatch.setattr("lightning_rec.recommend.artefact.read_vectors", vectors)
    opened = Artefact.read(place, verify=verify)
    assert len(swaps) == 2
    assert torch.equal(opened.vectors, wanted)


def test_texts_are_encoded_by_several_threads(artefact):
    texts = [[f"{colour} shoe", "old film"] for colour in ("red", "blue", "green", "big")] * 3
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(artefact.encode_texts, texts))
    for asked, vectors in zip(texts, found, strict=True):
        torch.testing.assert_close(vectors, artefact.encode_texts(asked))
