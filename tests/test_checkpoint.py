"""What a checkpoint holds, what it refuses, and that it loads anywhere without executing anything."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from lightning import Trainer, seed_everything

from lightning_rec import EcommerceDataModule, TwoTower
from lightning_rec.data.readers import Files
from lightning_rec.towers import (
    IdItemTower,
    IdUserTower,
    LanguageUserTower,
    PooledUserTower,
    SequenceUserTower,
    TextIdItemTower,
    TextItemTower,
)

SHOP = Path(__file__).parent / "data" / "files" / "shop"


def shop(folder=SHOP, **options):
    return EcommerceDataModule(
        Files(str(folder / "interactions.csv"), str(folder / "items.csv"), str(SHOP / "users.csv")),
        min_rating=0,
        batch_size=20,
        candidates="batch",
        **options,
    )


@pytest.fixture(scope="module")
def other_shop(tmp_path_factory):
    """The shop without its last item and without one user."""
    folder = tmp_path_factory.mktemp("other")
    items = (SHOP / "items.csv").read_text().splitlines()
    gone = items[-1].split(",")[0]
    (folder / "items.csv").write_text("\n".join(items[:-1]) + "\n")
    rows = (SHOP / "interactions.csv").read_text().splitlines()
    kept = [row for row in rows if f",{gone}," not in row and not row.startswith("u001,")]
    (folder / "interactions.csv").write_text("\n".join(kept) + "\n")
    return folder


def fit(module, folder, data=None):
    seed_everything(0, verbose=False)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        max_steps=2,
    )
    trainer.fit(module, data or shop())
    path = folder / "run.ckpt"
    trainer.save_checkpoint(path)
    return path


def read(path):
    return torch.load(path, weights_only=True)


LORA = {"r": 2, "target_modules": ["query", "value"]}


def test_lora_checkpoint_holds_adapters_and_heads_only(tmp_path, tiny_bert):
    tower = TextItemTower(tiny_bert, dim=8, peft=peft.LoraConfig(**LORA))
    path = fit(TwoTower(tower, SequenceUserTower(blocks=1, heads=1), language_lr=0.01), tmp_path)
    content = read(path)
    names = set(content["state_dict"])
    language = {name for name in names if ".encoder." in name}
    assert len(language) == 8, "A and B of query and value in two layers"
    assert all("lora_" in name for name in language)
    assert any(name.startswith("item_tower.projection") for name in names)
    assert any(name.startswith("user_tower.") for name in names)
    weights = sum(file.stat().st_size for file in Path(tiny_bert).glob("*.safetensors"))
    held = sum(
        value.numel() * value.element_size() for name, value in content["state_dict"].items() if ".encoder." in name
    )
    assert held < weights / 10


def test_frozen_language_model_is_not_in_the_checkpoint(tmp_path, tiny_bert):
    path = fit(
        TwoTower(TextItemTower(tiny_bert, dim=8), LanguageUserTower("shared")), tmp_path, shop(user_template="{city}")
    )
    assert not [name for name in read(path)["state_dict"] if "encoder" in name or name.endswith("vectors")]
    assert path.stat().st_size < 60_000


def test_hyperparameters_are_plain(tmp_path):
    path = fit(TwoTower(IdItemTower(4), PooledUserTower(), lr=0.02, top_k=3), tmp_path)
    content = read(path)
    assert content["hyper_parameters"]["lr"] == 0.02
    assert content["hyper_parameters"]["top_k"] == 3
    assert "item_tower" not in content["hyper_parameters"], "an object given from Python"
    assert content["datamodule_hyper_parameters"]["batch_size"] == 20
    assert "reader" not in content["datamodule_hyper_parameters"]


def test_loading_executes_nothing(tmp_path):
    path = fit(TwoTower(IdItemTower(4), PooledUserTower()), tmp_path)
    content = read(path)

    class Surprise:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({**content, "surprise": Surprise()}, path)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        TwoTower.load_from_checkpoint(path, item_tower=IdItemTower(4), user_tower=PooledUserTower(), weights_only=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("change", ["missing", "foreign", "renamed"])
def test_missing_and_foreign_keys_are_named(tmp_path, change):
    path = fit(TwoTower(IdItemTower(4), PooledUserTower("gru")), tmp_path)
    content = read(path)
    state = content["state_dict"]
    key = "user_tower.gru.weight_ih_l0"
    assert key in state
    if change == "missing":
        del state[key]
        expected = f"The checkpoint lacks {key}"
    elif change == "foreign":
        state["user_tower.elsewhere"] = torch.ones(1)
        expected = "The model has no user_tower.elsewhere"
    else:
        state["user_tower.gru.weight_ih"] = state.pop(key)
        expected = f"user_tower.gru.weight_ih may be called {key} here"
    torch.save(content, path)
    with pytest.raises(RuntimeError, match=expected):
        TwoTower.load_from_checkpoint(path, item_tower=IdItemTower(4), user_tower=PooledUserTower("gru"))
    with pytest.raises(RuntimeError, match=expected):
        evaluate(TwoTower(IdItemTower(4), PooledUserTower("gru")), path, shop())


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = fit(TwoTower(IdItemTower(4), PooledUserTower()), tmp_path)
    content = read(path)
    del content["catalogue"]
    torch.save(content, path)
    with pytest.raises(RuntimeError, match="not written by lightning_rec"):
        TwoTower.load_from_checkpoint(path, item_tower=IdItemTower(4), user_tower=PooledUserTower())


@pytest.mark.parametrize("kind", ["id", "text", "text_id", "lora", "full"])
def test_loading_without_data_gives_the_same_vectors(tmp_path, tiny_bert, kind):
    def item_tower():
        if kind == "id":
            return IdItemTower(8)
        if kind == "text_id":
            return TextIdItemTower(fusion="gate", language_model=tiny_bert, dim=8)
        adapter = peft.LoraConfig(**LORA) if kind == "lora" else None
        return TextItemTower(tiny_bert, dim=8, tune="full" if kind == "full" else None, peft=adapter)

    data = shop()
    module = TwoTower(item_tower(), SequenceUserTower(blocks=1, heads=1), language_lr=0.01)
    path = fit(module, tmp_path, data)
    seed_everything(5, verbose=False)  # what is new must not come out right by chance
    loaded = TwoTower.load_from_checkpoint(
        path, item_tower=item_tower(), user_tower=SequenceUserTower(blocks=1, heads=1), weights_only=True
    )
    assert loaded.n_rows == data.view.n_rows
    if kind != "id":
        with pytest.raises(RuntimeError, match="attach the data"):
            loaded.encode_catalogue()
    loaded.item_tower.prepare(data.view)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval().encode_catalogue(), module.eval().encode_catalogue())
    names = [name for name, _ in module.user_tower.named_parameters()]
    for name in names:
        torch.testing.assert_close(loaded.user_tower.get_parameter(name), module.user_tower.get_parameter(name))


def evaluate(module, path, data):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    return trainer.test(module, data, ckpt_path=str(path), weights_only=True, verbose=False)[0]


def test_another_catalogue_is_refused_by_id_towers(tmp_path, other_shop, tiny_bert):
    path = fit(TwoTower(IdItemTower(4), PooledUserTower()), tmp_path)
    with pytest.raises(
        RuntimeError, match=r"knows a catalogue of 30 items, but the data has 29 items.*text item tower"
    ):
        evaluate(TwoTower(IdItemTower(4), PooledUserTower()), path, shop(other_shop))


def test_the_same_ids_in_another_order_are_another_catalogue(tmp_path):
    path = fit(TwoTower(IdItemTower(4), PooledUserTower()), tmp_path)
    folder = tmp_path / "reversed"
    folder.mkdir()
    first, *rows = (SHOP / "items.csv").read_text().splitlines()
    (folder / "items.csv").write_text("\n".join([first, *reversed(rows)]) + "\n")
    (folder / "interactions.csv").write_text((SHOP / "interactions.csv").read_text())
    with pytest.raises(RuntimeError, match="another order"):
        evaluate(TwoTower(IdItemTower(4), PooledUserTower()), path, shop(folder))


def test_a_text_tower_carries_over_to_another_catalogue(tmp_path, other_shop, tiny_bert):
    def module():
        return TwoTower(TextItemTower(tiny_bert, dim=8), PooledUserTower("attention"))

    fitted = module()
    path = fit(fitted, tmp_path)
    data = shop(other_shop)
    other = module()
    figures = evaluate(other, path, data)
    assert 0 <= figures["test/ndcg@10"] <= 1
    with torch.no_grad():
        before, after = fitted.eval().encode_catalogue(), other.eval().encode_catalogue()
    assert after.shape[0] == before.shape[0] - 1
    # an item has the vector that it had: features are standardised as they were in training
    torch.testing.assert_close(after[1:], before[1:-1])
    assert other.train_counts.shape == (data.view.n_rows,)


def test_other_users_are_refused_by_a_tower_with_user_vectors(tmp_path, other_shop, tiny_bert):
    def module():
        return TwoTower(TextItemTower(tiny_bert, dim=8), IdUserTower())

    path = fit(module(), tmp_path)
    with pytest.raises(RuntimeError, match=r"knows 40 users, but the data has 39 users.*reads histories"):
        evaluate(module(), path, shop(other_shop))


def test_a_tensor_saved_elsewhere_loads_on_a_cpu(tmp_path, monkeypatch):
    from lightning_rec import run_files

    asked = {}
    real = torch.load

    def load(path, **options):
        asked.update(options)
        return real(path, **options)

    path = fit(TwoTower(IdItemTower(4), PooledUserTower()), tmp_path)
    monkeypatch.setattr(torch, "load", load)
    assert run_files.load_checkpoint(path)["catalogue"]["n_rows"] == 31
    assert asked["map_location"] == "cpu"
    assert asked["weights_only"] is True


def test_random_state_is_restored_for_a_resumed_run(tmp_path):
    module = TwoTower(IdItemTower(4), PooledUserTower())
    path = fit(module, tmp_path)
    content = read(path)
    other = TwoTower(IdItemTower(4), PooledUserTower())
    other.on_load_checkpoint(copy.deepcopy(content))
    other.on_train_batch_start(None, 0)
    assert torch.equal(torch.get_rng_state(), content["random_state"]["cpu"])
    drawn = torch.rand(3)
    other.on_train_batch_start(None, 1)  # once only
    assert not torch.equal(torch.rand(3), drawn)
