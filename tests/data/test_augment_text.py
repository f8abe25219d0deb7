"""Variants of texts: by hand, as properties, and through a tuned language model."""

import random
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from lightning_rec import EcommerceDataModule, TwoTower
from lightning_rec.data.augment_text import TextAugmentation, TextVariants, read_table
from lightning_rec.data.collate import BatchIndex
from lightning_rec.data.readers import Files
from lightning_rec.towers import IdItemTower, SequenceUserTower, TextItemTower

SHOP = Path(__file__).parent / "files" / "shop"
TEXTS = ["", "A big red shoe, for the city.", "手机 and a case", "!!!", "one", "the new York-style film"]


def variants(table=None, **options):
    chosen = {"replace": 0, "swap": 0, "delete": 0, "probability": 1} | options
    return TextVariants(TextAugmentation(**chosen), TEXTS, table)


def drawn(made, text, n=200):
    return {made.variant(text, random.Random(number)) for number in range(n)}


def test_nothing_is_changed_where_nothing_is_asked():
    made = variants()
    for text in TEXTS:
        assert drawn(made, text, 5) == {text}


def test_replacement_by_hand():
    made = variants({("big",): ["large", "huge"], ("red", "shoe"): ["sneaker"]}, replace=1)
    assert drawn(made, TEXTS[1]) == {"A large sneaker, for the city.", "A huge sneaker, for the city."}
    assert drawn(made, "Big! BIG, bigger big-time Red shoe", 5) <= {
        f"{a.title()}! {b.upper()}, bigger big-time Sneaker" for a in ("large", "huge") for b in ("large", "huge")
    }
    assert drawn(made, "red, shoe") == {"red, shoe"}, "an entry of two words is not torn apart by a comma"


def test_the_longest_entry_wins():
    made = variants({("red",): ["pink"], ("red", "shoe"): ["sneaker"]}, replace=1)
    assert drawn(made, "red shoe red") == {"sneaker pink"}


def test_scripts_without_spaces():
    made = variants({("手", "机"): ["移动电话"]}, replace=1)
    assert drawn(made, "红色手机壳") == {"红色移动电话壳"}
    assert "".join(sorted(drawn(variants(swap=1), "红色手机", 1).pop())) == "".join(sorted("红色手机"))


def test_swaps_keep_words_and_punctuation():
    found = drawn(variants(swap=0.3), TEXTS[1])
    assert len(found) > 10
    for text in found:
        assert sorted(text.replace(",", "").rstrip(".").split()) == sorted(
            ["A", "big", "red", "shoe", "for", "the", "city"]
        )
        assert text.endswith(".")
        assert text.count(",") == 1


def test_deletion_leaves_one_word_and_an_order():
    assert drawn(variants(delete=1), "red big shoe") == {"red", "big", "shoe"}
    for text in drawn(variants(delete=0.5), "red big shoe"):
        words = text.split()
        assert words
        assert words == [word for word in ["red", "big", "shoe"] if word in words]
        assert "  " not in text
    assert drawn(variants(delete=0.5), "one") == {"one"}
    assert drawn(variants(delete=1), "!!!") == {"!!!"}
    assert drawn(variants(delete=1), "") == {""}


def test_shares_are_kept():
    made = variants(delete=0.2)
    text = " ".join(["word"] * 50)
    left = np.mean([len(made.variant(text, random.Random(number)).split()) for number in range(300)]) / 50
    assert abs(left - 0.8) < 4 * np.sqrt(0.16 / 15_000)
    some = variants(delete=1, probability=0.25)
    changed = [some.items(np.array([1]), (number,))[0] != TEXTS[1] for number in range(1000)]
    assert abs(np.mean(changed) - 0.25) < 4 * np.sqrt(0.1875 / 1000)


def test_draws_depend_on_seed_and_row_only():
    made = variants(delete=0.3, swap=0.3)
    rows = np.array([5, 1, 1])
    first = made.items(rows, (0, 1, 2))
    assert first == made.items(rows, (0, 1, 2))
    assert first[1] == first[2] == made.items(np.array([1]), (0, 1, 2))[0]
    assert len({made.items(np.array([1]), (0, 1, step))[0] for step in range(20)}) > 5, "each step draws anew"


def test_whose_texts():
    rows = np.array([1])
    assert variants(delete=1).users(["red big shoe"], rows, (0,)) == ["red big shoe"]
    only_users = variants(delete=1, texts="users")
    assert only_users.items(rows, (0,)) is None
    assert only_users.users(["red big shoe"], rows, (0,))[0] in ("red", "big", "shoe")
    assert variants(delete=1, texts="both").items(rows, (0,)) != [TEXTS[1]]


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'Big,large,"very large"\n\nred shoe,sneaker\n'),
        ("t.tsv", "Big\tlarge\tvery large\nred shoe\tsneaker"),
        ("t.json", '{"Big": ["large", "very large"], "red shoe": "sneaker"}'),
    ],
)
def test_tables(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_table(str(tmp_path / name)) == {("big",): ["large", "very large"], ("red", "shoe"): ["sneaker"]}


def test_groups_replace_each_other(tmp_path):
    (tmp_path / "t.json").write_text('[["film", "movie"], ["movie", "picture", "film"]]')
    assert read_table(str(tmp_path / "t.json")) == {
        ("film",): ["movie", "picture"],
        ("movie",): ["film", "picture"],
        ("picture",): ["movie", "film"],
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "big,large\nred\n", r"t\.csv, line 2: a word and at least one replacement are needed"),
        ("t.csv", ",large\n", r"t\.csv, line 1: a word and at least one"),
        ("t.json", "{\n\n", r"t\.json, line 3: it is not JSON"),
        ("t.json", '"big"', r"t\.json: it should hold an object"),
        ("t.json", '{"big": 3}', r"t\.json, entry 'big': words and their replacements are texts"),
        ("t.txt", "big large", r"a file \.csv, \.tsv or \.json, but names .*t\.txt"),
    ],
)
def test_bad_tables_name_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_table(str(tmp_path / name))


def test_a_missing_table_and_bad_shares():
    with pytest.raises(FileNotFoundError, match=r"text_augmentation\.table names nowhere\.csv, which is no file"):
        read_table("nowhere.csv")
    with pytest.raises(ValueError, match=r"text_augmentation\.delete is a share from 0 to 1, not 2"):
        TextAugmentation(delete=2)


# ---------------------------------------------------------------------- through the towers


def shop(augmentation, **options):
    data = EcommerceDataModule(
        Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv")),
        **({"min_rating": 0, "candidates": "batch", "text_augmentation": augmentation} | options),
    )
    data.setup()
    return data


LORA = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
STRONG = TextAugmentation(probability=1, delete=0.5, swap=0.5)


def test_a_tuned_tower_reads_the_variants_in_training_only(tiny_bert):
    data = shop(STRONG)
    tower = TextItemTower(tiny_bert, dim=8, peft=LORA, init_std=None)
    module = TwoTower(tower, SequenceUserTower(blocks=1, heads=1, dropout=0.0))
    module.check_data(data)
    module.build(data.view)
    tower.prepare(data.view)
    made = data.train_dataset()
    batch, again, other = (made[BatchIndex(np.arange(6), (0, 0, step, 0))] for step in (1, 1, 2))
    assert batch.items.texts == again.items.texts != other.items.texts
    assert len(batch.items.texts) == len(batch.items)
    assert [len(text) for text in batch.items.texts] != [
        len(data.catalogue.texts[r]) for r in batch.items.rows.tolist()
    ]
    tower.eval()
    plain = tower(batch.items)
    torch.testing.assert_close(plain, tower.encode_texts([data.catalogue.texts[r] for r in batch.items.rows.tolist()]))
    for layer in tower.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    tower.train()
    changed = tower(batch.items)
    torch.testing.assert_close(changed, tower.encode_texts(batch.items.texts))
    assert not torch.allclose(changed, plain)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert all(found.items is None for found in loader), "evaluation takes the catalogue as it is"


@pytest.mark.parametrize("tower", [lambda bert: TextItemTower(bert, dim=8), lambda bert: IdItemTower(8)])
def test_towers_that_cannot_read_variants_refuse(tiny_bert, tower):
    module = TwoTower(tower(tiny_bert), SequenceUserTower(blocks=1, heads=1))
    with pytest.raises(
        ValueError,
        match=r"does not read them .* with a tuned language model",
    ):
        module.check_data(shop(STRONG))
    module.check_data(shop(TextAugmentation(texts="users"), user_template="{titles}"))


def test_users_texts_are_changed_in_training():
    options = {"user_template": "{titles}", "supervision": "random"}
    plain, changed = (
        shop(TextAugmentation(probability=probability, delete=0.5, texts="users"), **options).train_dataset()
        for probability in (0, 1)
    )
    index = BatchIndex(np.arange(10), (0, 0, 0, 0))
    assert plain[index].users.texts != changed[index].users.texts
    assert changed[index].items.texts is None
    assert plain[index].users.history.tolist() == changed[index].users.history.tolist()


def test_users_without_texts_are_named():
    with pytest.raises(ValueError, match=r"text_augmentation\.texts is users, but users have no texts"):
        shop(TextAugmentation(texts="users")).train_dataset()


def test_objects_given_from_python_are_no_hyperparameters():
    assert "text_augmentation" not in shop(STRONG).hparams
    assert shop(STRONG).hparams["candidates"] == "batch"
