import copy

import peft
import pytest
import torch

from lightning_rec.data.batch import CatalogueView, ItemBatch
from lightning_rec.towers import IdItemTower, TextIdItemTower, TextItemTower, parameter_summary

CATALOGUE = CatalogueView(
    n_rows=6,
    texts=["", "red shoe", "the old film of war", "", "red shoe", "new song"],
    counts=torch.tensor([0, 5, 2, 0, 1, 0]),
)
WHOLE = ItemBatch(torch.arange(6), whole=True)


def build(tower, catalogue=CATALOGUE, prepare=True):
    torch.manual_seed(0)
    tower.configure(catalogue)
    if prepare:
        tower.prepare(catalogue)
    return tower.eval()


def towers(model):
    lora = peft.LoraConfig(r=2)
    return {
        "id": IdItemTower(8),
        "text": TextItemTower(model, dim=8),
        "text-mlp-raw": TextItemTower(model, dim=8, projection="mlp", features="raw"),
        "text-none": TextItemTower(model, dim=None, projection="none", features="normalise"),
        "text-lora": TextItemTower(model, dim=8, peft=lora),
        "text-full": TextItemTower(model, dim=8, tune="full", token_budget=8),
        "sum": TextIdItemTower("sum", language_model=model, dim=8),
        "concat": TextIdItemTower("concat", language_model=model, dim=8),
        "gate": TextIdItemTower("gate", language_model=model, dim=8),
        "gate-lora": TextIdItemTower("gate", language_model=model, dim=8, peft=lora),
    }


@pytest.mark.parametrize("kind", list(towers("")))
def test_the_whole_catalogue_equals_its_rows_one_by_one(tiny_bert, kind):
    tower = build(towers(tiny_bert)[kind])
    whole = tower(WHOLE)
    assert whole.shape == (6, tower.dim)
    torch.testing.assert_close(tower(ItemBatch(torch.arange(6))), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(tower(ItemBatch(torch.tensor([0, 4, 2]))), whole[[0, 4, 2]], atol=1e-5, rtol=0)
    summary = parameter_summary(tower)
    assert 0 <= summary["trainable"] <= summary["total"]
    whole.sum().backward() if summary["trainable"] else None
    tower.train()
    loss = tower(ItemBatch(torch.tensor([0, 4, 2]))).square().sum()
    if summary["trainable"]:
        loss.backward()


def test_id_tower_has_a_zero_row_for_padding():
    tower = build(IdItemTower(8, init_std=0.5))
    assert not tower(WHOLE)[0].any()
    assert 0.3 < tower(WHOLE)[1:].std() < 0.7


def test_standardised_features_keep_their_statistics_in_the_checkpoint(tiny_bert):
    tower = build(TextItemTower(tiny_bert, dim=8))
    assert tower.vectors[1:].mean(0).abs().max() < 1e-5
    assert (tower.vectors[1:].std(0, unbiased=False) - 1).abs().max() < 1e-3
    assert set(tower.state_dict()) == {
        "feature_mean",
        "feature_scale",
        "measured",
        "projection.weight",
        "projection.bias",
    }
    other_shop = CatalogueView(n_rows=3, texts=["", "blue boot", "red shoe"])
    moved = TextItemTower(tiny_bert, dim=8)
    moved.configure(other_shop)
    moved.load_state_dict(tower.state_dict())
    moved.prepare(other_shop)
    torch.testing.assert_close(moved.eval()(ItemBatch(torch.arange(3), whole=True))[2], tower(WHOLE)[1])


@pytest.mark.parametrize("kind", ["text", "text-none", "text-lora", "sum", "concat", "gate"])
def test_a_new_item_is_known_by_its_text(tiny_bert, kind):
    tower = build(towers(tiny_bert)[kind])
    vectors = tower.encode_texts(["new song", "blue boot"])
    assert vectors.shape == (2, tower.dim)
    # Row 5 was never trained on: it is its text alone, exactly as an item without a row.
    torch.testing.assert_close(vectors[0], tower(WHOLE)[5], atol=1e-5, rtol=0)


def test_cold_items_have_no_id_part_and_stay_cold_after_a_reload(tiny_bert):
    tower = build(TextIdItemTower("sum", language_model=tiny_bert, dim=8, id_init_std=1.0))
    whole = tower(WHOLE)
    text = TextItemTower.forward(tower, WHOLE)
    assert torch.equal(whole[[0, 3, 5]], text[[0, 3, 5]])
    torch.testing.assert_close(whole[1] - text[1], tower.table.weight[1])
    loaded = TextIdItemTower("sum", language_model=tiny_bert, dim=8)
    loaded.configure(CatalogueView(n_rows=6))
    loaded.load_state_dict(tower.state_dict())
    loaded.prepare(CatalogueView(n_rows=6, texts=CATALOGUE.texts, counts=torch.ones(6)))
    torch.testing.assert_close(loaded.eval()(WHOLE), whole)


def test_id_dropout_leaves_whole_ids_out_in_training_only(tiny_bert):
    tower = build(TextIdItemTower("sum", language_model=tiny_bert, dim=8, id_dropout=0.5, id_init_std=1.0))
    text, full = TextItemTower.forward(tower, WHOLE), tower(WHOLE)
    tower.train()
    seen = set()
    for _ in range(20):
        row = tower(WHOLE)[1]
        seen.add("text" if torch.equal(row, text[1]) else "both")
        if not torch.equal(row, text[1]):
            torch.testing.assert_close(row, full[1])
    assert seen == {"text", "both"}


def test_fusions_by_hand(tiny_bert):
    text, ids = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -2.0]])
    for fusion, expected in [("sum", [4.0, 0.0]), ("concat", [0.0, 0.0]), ("gate", [2.0, 0.0])]:
        tower = build(TextIdItemTower(fusion, language_model=tiny_bert, dim=2))
        if fusion != "sum":
            torch.nn.init.zeros_(tower.mix.weight)
            torch.nn.init.zeros_(tower.mix.bias)
        assert tower._fuse(text, ids).tolist() == [expected]


def test_language_parameters(tiny_bert):
    assert not list(build(TextItemTower(tiny_bert)).language_parameters())
    lora = build(TextItemTower(tiny_bert, peft=peft.LoraConfig(r=2)))
    assert {id(p) for p in lora.language_parameters()} == {
        id(p) for n, p in lora.named_parameters() if "lora_" in n and p.requires_grad
    }
    full = build(TextItemTower(tiny_bert, tune="full"))
    assert len(list(full.language_parameters())) == len(list(full.encoder.parameters()))
    assert not list(build(IdItemTower(4)).language_parameters())


@pytest.mark.parametrize("options", [{}, {"tune": "full"}])
def test_items_before_texts(tiny_bert, options):
    tower = build(TextItemTower(tiny_bert, **options), CatalogueView(n_rows=6))
    with pytest.raises(RuntimeError, match="attach the data"):
        tower(WHOLE)
    with pytest.raises(ValueError, match="7 rows but 1 texts"):
        tower.prepare(CatalogueView(n_rows=7, texts=["one"]))


def test_no_projection_fixes_the_width(tiny_bert):
    with pytest.raises(ValueError, match="width, 16, but dim is 64"):
        build(TextItemTower(tiny_bert, projection="none"))
    assert build(TextItemTower(tiny_bert, dim=None)).dim == 16


def test_init_std_sets_the_scale_of_the_vectors(tiny_bert):
    words = ["red", "blue", "dog", "cat", "war", "love", "old", "new"]
    texts = ["", *(f"{one} {other}" for one in words for other in words)]
    catalogue = CatalogueView(n_rows=len(texts), texts=texts)
    tower = build(TextItemTower(tiny_bert, dim=64, init_std=0.02), catalogue)
    assert 0.01 < tower(ItemBatch(torch.arange(len(texts)), whole=True))[1:].std() < 0.04


def test_a_copy_is_independent(tiny_bert):
    tower = build(TextItemTower(tiny_bert, dim=8))
    twin = copy.deepcopy(tower)
    torch.testing.assert_close(twin(WHOLE), tower(WHOLE))


def test_the_command_line_sees_every_option(tiny_bert):
    from jsonargparse import ArgumentParser

    from lightning_rec.towers import ItemTower

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ItemTower, "tower")
    config = parser.parse_object(
        {
            "tower": {
                "class_path": "lightning_rec.towers.TextIdItemTower",
                "init_args": {
                    "fusion": "gate",
                    "language_model": tiny_bert,
                    "dim": 8,
                    "peft": {"class_path": "peft.LoraConfig", "init_args": {"r": 2}},
                },
            }
        }
    )
    tower = parser.instantiate_classes(config).tower
    assert isinstance(tower, TextIdItemTower)
    assert build(tower)(WHOLE).shape == (6, 8)


def test_minilm_tower(minilm, tmp_path):
    tower = build(TextItemTower(cache_dir=str(tmp_path)))
    assert tower(WHOLE).shape == (6, 64)
