import peft
import pytest
import torch

from lightning_rec.data.batch import CatalogueView, UserBatch
from lightning_rec.towers import IdItemTower, LanguageUserTower, TextItemTower

CATALOGUE = CatalogueView(n_rows=3, texts=["", "red shoe", "old film"])
TEXTS = ["red shoe", "", "the old dog of the city", "red shoe"]


def users(texts):
    n = len(texts) if texts else 1
    return UserBatch(torch.zeros(n, 2, dtype=torch.long), torch.zeros(n), torch.zeros(n, dtype=torch.long), texts=texts)


def build(tower, item_tower):
    item_tower.configure(CATALOGUE)
    tower.configure(CATALOGUE, item_tower)
    item_tower.eval()
    return tower


@pytest.mark.parametrize(
    "options", [{}, {"peft": peft.LoraConfig(r=2)}, {"tune": "full"}], ids=["frozen", "lora", "full"]
)
@pytest.mark.parametrize("shared", [True, False])
def test_one_interest_vector_a_user(tiny_bert, options, shared):
    item_tower = TextItemTower(tiny_bert, dim=8, **(options if shared else {}))
    own = {} if shared else {"language_model": tiny_bert, **options}
    tower = build(LanguageUserTower(projection="mlp", **own), item_tower).eval()
    interest = tower(users(TEXTS), torch.zeros(3, 8))
    assert interest.shape == (4, 1, 8)
    torch.testing.assert_close(interest[0], interest[3])
    torch.testing.assert_close(tower(users(TEXTS[2:3]), torch.zeros(3, 8))[0], interest[2], atol=1e-5, rtol=1e-5)
    interest.sum().backward()
    tuned = [p for p in tower.encoder.parameters() if p.requires_grad]
    assert bool(tuned) == bool(options)
    assert all(p.grad is not None for p in tuned)
    assert len(list(tower.language_parameters())) == (0 if shared else len(tuned))


def test_a_shared_model_lies_in_the_checkpoint_once(tiny_bert):
    item_tower = TextItemTower(tiny_bert, dim=8, tune="full")
    tower = build(LanguageUserTower(), item_tower)
    assert tower.encoder is item_tower.encoder
    assert not any(name.startswith("encoder") for name in tower.state_dict())


def test_vectors_remembered_in_validation_serve_training(tiny_bert):
    tower = build(LanguageUserTower(language_model=tiny_bert), TextItemTower(tiny_bert, dim=8))
    with torch.inference_mode():
        tower(users(TEXTS), torch.zeros(3, 8))
    calls = []
    tower.encoder.encode = lambda *_: calls.append(1)
    tower(users(TEXTS[:1]), torch.zeros(3, 8)).sum().backward()
    assert tower.projection.weight.grad is not None
    assert not calls, "the text was not encoded again"


@pytest.mark.parametrize(("remembered", "read"), [(0, [3, 3]), (1, [3, 2]), (3, [3, 0])])
def test_the_newest_texts_are_remembered(remembered, read, tiny_bert):
    tower = build(LanguageUserTower(tiny_bert, remembered=remembered), TextItemTower(tiny_bert, dim=8)).eval()
    first = tower.encoder.encode
    counts = []
    tower.encoder.encode = lambda texts, device: counts.append(len(texts)) or first(texts, device)
    vectors = [tower(users(TEXTS), torch.zeros(3, 8)) for _ in range(2)]
    torch.testing.assert_close(vectors[0], vectors[1])
    assert counts == [number for number in read if number]


def test_a_text_makes_a_user_known(tiny_bert):
    tower = build(LanguageUserTower(language_model=tiny_bert), TextItemTower(tiny_bert, dim=8))
    batch = users(["red shoe", "", " ", "old film", ""])
    batch.lengths = torch.tensor([0, 0, 0, 2, 1])
    assert tower.knows(batch).tolist() == [True, False, False, True, False]
    batch.texts = None
    assert tower.knows(batch).tolist() == [False, False, False, True, True]


def test_errors_name_the_option(tiny_bert):
    with pytest.raises(ValueError, match="IdItemTower has none"):
        build(LanguageUserTower(), IdItemTower(8))
    with pytest.raises(ValueError, match="tuned as the item tower says"):
        LanguageUserTower(tune="full")
    with pytest.raises(ValueError, match=r"remembered is a number of texts, at least 0, but is -1\."):
        LanguageUserTower(remembered=-1)
    tower = build(LanguageUserTower(), TextItemTower(tiny_bert, dim=8))
    with pytest.raises(ValueError, match="user_template"):
        tower(users(None), torch.zeros(3, 8))
