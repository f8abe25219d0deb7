import copy

import peft
import pytest
import torch

from lightning_rec.data.batch import CatalogueView, ItemBatch
from lightning_rec.towers import NewsItemTower, WordOptions

FIELDS = {
    "title": ["", "red shoe", "the old film of war", "", "red shoe", "new song", "", "red shoe", ""],
    "abstract": ["", "a new red shoe", "", "", "a new red shoe", "  ", "big dog", "small cat", ""],
    "category": ["", "fashion", "movies", "", "fashion", "music", "", "fashion", "music"],
    "subcategory": ["", "shoes", "war", "", "shoes", "", "", "shoes", ""],
    "entities": [[], ["Q1", "Q2"], ["Q3"], [], ["Q1", "Q2", "Q1"], [], ["Q4"], ["Q2"], []],
}
N = 9
NEWS = CatalogueView(n_rows=N, texts=[f"text {row}" if row else "" for row in range(N)], fields=FIELDS)
WHOLE = ItemBatch(torch.arange(N), whole=True)
WORDS = WordOptions(dim=6, heads=2, head_dim=4, hidden=3)
NEW = {"title": ["red film", ""], "category": ["music", "unheard"], "entities": [["Q3", "Q99"], []]}


def build(catalogue=NEWS, prepare=True, **options):
    torch.manual_seed(0)
    tower = NewsItemTower(**({"dim": 8, "category_dim": 4, "entity_dim": 3, "hidden": 5} | options))
    tower.configure(catalogue)
    if "entity_vectors" not in options:
        for view in tower.name_views:  # they start at zero
            torch.nn.init.normal_(view.table.vectors[1:])
    if prepare:
        tower.prepare(catalogue)
    return tower.eval()


def kinds(model):
    lora = peft.LoraConfig(r=2)
    return {
        "frozen": {"language_model": model},
        "frozen-raw": {"language_model": model, "features": "raw", "entity_pooling": "attention"},
        "lora": {"language_model": model, "peft": lora},
        "full": {"language_model": model, "tune": "full", "token_budget": 8},
        "words": {"words": WORDS},
        "words-cnn": {"words": WordOptions(dim=6, encoder="cnn", filters=5)},
        "title": {"language_model": model, "abstract": None, "categories": None, "entities": None},
        "title-words": {"words": WORDS, "abstract": None, "categories": None, "entities": None},
        "no-text": {"title": None, "abstract": None},
        "categories": {"title": None, "abstract": None, "entities": None, "categories": ("category",)},
    }


@pytest.fixture(params=list(kinds("")))
def options(request, tiny_bert):
    return kinds(tiny_bert)[request.param]


def test_the_whole_catalogue_equals_its_rows_in_any_order(options):
    tower = build(**options)
    whole = tower(WHOLE)
    assert whole.shape == (N, 8)
    order = torch.tensor([0, 7, 2, 5, 6, 1])
    torch.testing.assert_close(tower(ItemBatch(order)), whole[order], atol=1e-5, rtol=1e-4)
    for row in range(N):
        torch.testing.assert_close(tower(ItemBatch(torch.tensor([row])))[0], whole[row], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(tower(WHOLE), whole, atol=1e-5, rtol=1e-4)
    assert tower(ItemBatch(torch.zeros(0, dtype=torch.long))).shape == (0, 8)


def test_an_unknown_article_is_an_empty_text(options):
    tower = build(**options)
    whole = tower(WHOLE)
    assert torch.equal(whole[3], whole[0])
    if not tower.text_fields:
        assert not whole[3].any()
        with pytest.raises(ValueError, match=r"reads no text, only .*category"):
            tower.encode_texts([""])
        return
    assert whole[3].any()
    empty = tower.encode_texts(["", "red shoe", "  "])
    torch.testing.assert_close(empty[0], whole[3], atol=1e-6, rtol=1e-5)
    assert torch.equal(empty[0], empty[2])
    assert not torch.allclose(empty[0], empty[1])


def test_articles_that_say_the_same_have_exactly_one_vector(options):
    tower = build(**options)
    whole = tower(WHOLE)
    assert torch.equal(whole[1], whole[4])
    if "abstract" in tower.fields:
        assert not torch.allclose(whole[1], whole[7])


def test_every_parameter_learns(options):
    tower = build(**options).train()
    tower(ItemBatch(torch.tensor([0, 1, 2, 6, 5]))).square().sum().backward()
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            # LoRA's A waits for its B, which starts at zero; one view gets all the attention whatever it is.
            # No word of the catalogue is unknown.
            assert parameter.grad.any() or "lora_A" in name or name.endswith("unknown"), name
    # An article without anything breaks nothing, nor does a step that uses some views only.
    tower.zero_grad()
    tower(ItemBatch(torch.tensor([0, 3]))).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters() if p.requires_grad)


def test_attention_over_views_equals_the_plain_formula(tiny_bert):
    tower = build(language_model=tiny_bert)
    whole = tower(WHOLE)
    texts = tower.articles.texts
    places = ["", *dict.fromkeys(t.strip() for name in ("title", "abstract") for t in FIELDS[name] if t.strip())]
    category, subcategory, entity = tower.name_views
    for row in range(1, N):
        views = []
        for projection, name in zip(tower.projections, ("title", "abstract"), strict=True):
            if FIELDS[name][row].strip():
                views.append(projection(texts[places.index(FIELDS[name][row])]))
        for view, name in ((category, "category"), (subcategory, "subcategory")):
            if FIELDS[name][row]:
                views.append(view.projection(view.table.vectors[view.table.rows[FIELDS[name][row]]]))
        if FIELDS["entities"][row]:
            ids = [entity.table.rows[name] for name in dict.fromkeys(FIELDS["entities"][row])]
            views.append(entity.projection(entity.table.vectors[ids].mean(0)))
        if not views:
            views = [tower.projections[0](texts[0])]
        stacked = torch.stack(views)
        hidden = torch.tanh(stacked @ tower.attention.hidden.weight.T + tower.attention.hidden.bias)
        weights = (hidden @ tower.attention.query.weight[0]).softmax(0)
        torch.testing.assert_close(whole[row], weights @ stacked)


def test_new_articles_are_read_like_those_of_the_catalogue(options):
    tower = build(**options).train()
    whole = tower.eval()(WHOLE)
    tower.train()
    new = tower.encode_items({name: column[1:] for name, column in FIELDS.items()} | {"url": ["x"] * 8})
    assert tower.training
    torch.testing.assert_close(new, whole[1:], atol=1e-5, rtol=1e-4)
    assert tower.encode_items({name: [] for name in tower.fields}).shape == (0, 8)


def test_new_articles_need_columns_of_one_length():
    tower = build(words=WORDS)
    with pytest.raises(ValueError, match=r"equally many values .* given: title \(1\), category \(2\)"):
        tower.encode_items({"title": ["a"], "category": ["a", "b"]})
    with pytest.raises(ValueError, match="given: none of them"):
        tower.encode_items({"headline": ["a"]})


def test_odd_values():
    tower = build(words=WORDS)
    plain = tower.encode_items(
        {"title": ["red shoe", "red", "", "red"], "category": ["fashion", "", "music", ""], "entities": [["Q1"]] * 4}
    )
    odd = tower.encode_items(
        {
            "title": [["red", " shoe "], " red ", None, ["red", None]],
            "category": [["fashion", "fashion"], "unheard", " music ", None],
            "subcategory": [None, [], [""], ["", None]],
            "entities": [["Q1", "Q1"], "Q1", ["Q99", " Q1"], ("Q1",)],
        }
    )
    torch.testing.assert_close(odd, plain)


def test_entities_beyond_the_limit_are_left_out():
    tower = build(words=WORDS, max_entities=2)
    few, many = ({"title": ["red"], "entities": [["Q3", "Q1", *more]]} for more in ([], ["Q2", "Q4"]))
    assert torch.equal(tower.encode_items(few), tower.encode_items(many))
    rare = build(words=WORDS, min_entity_count=2)
    assert set(rare.name_views[-1].table.rows) == {"Q1", "Q2"}


@pytest.mark.parametrize("tuned", [True, False])
def test_entity_vectors_of_mind(tmp_path, tuned):
    path = tmp_path / "entity_embedding.vec"
    path.write_text("Q1\t0.1\t0.2\t0.3\t\nQ77\t1\t1\t1\t\nQ3\t-0.1\t0\t0.5\t\n")
    tower = build(words=WORDS, entity_vectors=str(path), tune_entities=tuned)
    table = tower.name_views[-1].table
    scale = ((0.01 + 0.04 + 0.09 + 0.01 + 0.25) / 6) ** 0.5
    torch.testing.assert_close(table.vectors[table.rows["Q1"]], torch.tensor([0.1, 0.2, 0.3]) / scale)
    assert "Q2" not in table.rows or not table.vectors[table.rows["Q2"]].any()
    assert set(table.rows) == ({"Q1", "Q2", "Q3", "Q4"} if tuned else {"Q1", "Q3"})
    assert ("vectors" in dict(table.named_parameters())) == tuned
    other = tmp_path / "dev.vec"
    other.write_text("Q1\t9\t9\t9\t\nQ2\t0.1\t0.2\t0.3\t\n")  # the first file that has a name counts
    both = build(words=WORDS, entity_vectors=[str(path), str(other)], tune_entities=tuned).name_views[-1].table
    torch.testing.assert_close(both.vectors[both.rows["Q2"]], both.vectors[both.rows["Q1"]])
    fresh = build(CatalogueView(n_rows=N), False, words=WORDS, entity_vectors="gone.vec", tune_entities=tuned)
    fresh.load_state_dict(tower.state_dict())
    assert torch.equal(fresh.encode_items(NEW), tower.encode_items(NEW))
    with pytest.raises(ValueError, match=r"embedding.vec, line 1: the vectors are 3 wide, but entity_dim is 100"):
        build(words=WORDS, entity_dim=100, entity_vectors=str(path))
    with pytest.raises(ValueError, match="tune_entities is false"):
        NewsItemTower(tune_entities=False)


def test_a_category_without_training_says_nothing():
    tower = NewsItemTower(words=WORDS, dim=8)
    tower.configure(NEWS)
    assert all(not view.table.vectors.any() for view in tower.name_views)
    tower.prepare(NEWS)
    tower.train()(ItemBatch(torch.tensor([0, 1]))).square().sum().backward()
    category = tower.name_views[0].table
    assert category.vectors.grad[category.rows["fashion"]].any()
    assert not category.vectors.grad[category.rows["music"]].any()


def test_fields_that_the_data_lacks(caplog):
    some = CatalogueView(n_rows=N, fields={"title": FIELDS["title"], "category": FIELDS["category"]})
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        tower = build(some, words=WORDS)
    assert "No article has abstract or subcategory or entities" in caplog.text
    assert tower(WHOLE).shape == (N, 8)
    with pytest.raises(ValueError, match=r"has none of these fields\. Its fields are: headline\."):
        build(CatalogueView(n_rows=1, fields={"headline": [""]}), words=WORDS)
    with pytest.raises(ValueError, match="no view left"):
        NewsItemTower(title=None, abstract=None, categories=None, entities=None)
    with pytest.raises(ValueError, match="no view left"):
        NewsItemTower(title=None, abstract=None, categories=(), entities=None)
    with pytest.raises(ValueError, match="words, and tune or peft"):
        NewsItemTower(words=WORDS, tune="full")


def test_without_fields_the_text_is_the_only_view():
    texts = ["", "red shoe", "", "old film"]
    for fields in ({}, {"headline": texts}):
        tower = build(CatalogueView(n_rows=4, texts=texts, fields=fields), words=WORDS)
        whole = tower(ItemBatch(torch.arange(4)))
        torch.testing.assert_close(tower.encode_texts(texts), whole)
        assert torch.equal(whole[0], whole[2])


def test_articles_before_data(options):
    tower = build(CatalogueView(n_rows=N), **options)
    with pytest.raises(RuntimeError, match="attach the data"):
        tower(WHOLE)
    with pytest.raises(ValueError, match=r"has 8 rows but 9 values of"):
        tower.prepare(CatalogueView(n_rows=8, fields=FIELDS))


def test_the_state_goes_anywhere_without_data(options, tmp_path):
    tower = build(**options)
    torch.save(tower.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    fresh = build(CatalogueView(n_rows=N), **options)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.encode_items(NEW), tower.encode_items(NEW))
    assert [name for name, _ in fresh.named_parameters()] == [name for name, _ in tower.named_parameters()]
    # Another catalogue, whose words, categories and entities are others: those of the checkpoint stay.
    other = CatalogueView(n_rows=3, fields={"title": ["", "red film", ""], "category": ["", "music", "gossip"]})
    moved = build(other, False, **options)
    moved.load_state_dict(state)
    moved.prepare(other)
    known = {name: column[:1] for name, column in NEW.items() if name != "entities"}
    torch.testing.assert_close(moved(ItemBatch(torch.arange(3)))[1:2], tower.encode_items(known), atol=1e-5, rtol=1e-4)


def test_one_text_or_none_is_enough_for_a_frozen_model(tiny_bert):
    for title in (["", "red shoe"], ["", ""]):
        tower = build(CatalogueView(n_rows=2, fields={"title": title}), language_model=tiny_bert)
        assert not tower.text.measured
        assert tower.encode_texts(["new song"]).abs().max() < 100


def test_each_distinct_text_is_encoded_once_a_step(tiny_bert, monkeypatch):
    tower = build(language_model=tiny_bert, tune="full")
    asked = []
    encode = tower.text.encoder.encode_table
    monkeypatch.setattr(tower.text.encoder, "encode_table", lambda t, rows: asked.append(len(rows)) or encode(t, rows))
    tower(WHOLE)
    # "", three titles, three abstracts
    assert asked == [7]


def test_training_after_validation(options):
    tower = build(prepare=False, **options)
    with torch.inference_mode():
        tower.prepare(NEWS)
        tower(WHOLE)
        tower.encode_items({name: column[:2] for name, column in FIELDS.items()})
    tower.train()(WHOLE).sum().backward()


def test_language_parameters(tiny_bert):
    assert not list(build(language_model=tiny_bert).language_parameters())
    assert not list(build(words=WORDS).language_parameters())
    assert not list(build(title=None, abstract=None).language_parameters())
    lora = build(language_model=tiny_bert, peft=peft.LoraConfig(r=2))
    names = {id(parameter): name for name, parameter in lora.named_parameters()}
    assert all("lora_" in names[id(parameter)] for parameter in lora.language_parameters())
    assert len(list(lora.language_parameters())) == 8


def test_init_std_and_copies(tiny_bert):
    tower = build(language_model=tiny_bert, init_std=0.02)
    assert tower(WHOLE)[1:].std() < 0.04
    torch.testing.assert_close(copy.deepcopy(tower)(WHOLE), tower(WHOLE))
    usual = build(language_model=tiny_bert)(WHOLE)
    assert 0.1 < usual.std() < 1.5


def test_the_command_line_sees_every_option(tiny_bert):
    from jsonargparse import ArgumentParser

    from lightning_rec.towers import ItemTower

    lora = {"class_path": "peft.LoraConfig", "init_args": {"r": 2}}
    for given, check in [
        ({"language_model": tiny_bert, "peft": lora, "categories": ["category"]}, lambda t: not t.text.frozen),
        ({"words": {}, "abstract": None}, lambda t: t.text.width == 256),
        ({"words": {"encoder": "cnn", "filters": 7}}, lambda t: t.text.width == 7),
        ({"words": None, "title": None, "abstract": None}, lambda t: t.fields[0] == "category"),
    ]:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(ItemTower, "tower")
        config = parser.parse_object(
            {"tower": {"class_path": "lightning_rec.towers.NewsItemTower", "init_args": given}}
        )
        again = parser.parse_string(parser.dump(config, skip_none=False))
        tower = parser.instantiate(again).tower
        tower.configure(NEWS)
        tower.prepare(NEWS)
        assert check(tower)
        assert tower(WHOLE).shape == (N, 64)


def test_a_run_and_its_checkpoint_without_data(tmp_path, tiny_bert):
    import csv

    from lightning import Trainer

    from lightning_rec import NewsDataModule, TwoTower
    from lightning_rec.data.readers import Files
    from lightning_rec.towers import LSTURUserTower, NRMSUserTower

    with (tmp_path / "items.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["item_id", "title"], *([f"n{row}", f"red film {row}"] for row in range(1, 7))])
    with (tmp_path / "clicks.csv").open("w", newline="") as file:
        rows = [[f"u{user}", f"n{(user + step) % 6 + 1}", 1000 + step] for user in range(6) for step in range(5)]
        csv.writer(file).writerows([["user_id", "item_id", "timestamp"], *rows])
    for user_tower in (NRMSUserTower(heads=2), LSTURUserTower()):
        data = NewsDataModule(
            Files(str(tmp_path / "clicks.csv"), str(tmp_path / "items.csv")), batch_size=4, split="leave_one_out"
        )
        module = TwoTower(NewsItemTower(words=WORDS, dim=8), user_tower)
        trainer = Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            max_steps=2,
        )
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        loaded = TwoTower.load_from_checkpoint(
            tmp_path / "run.ckpt",
            weights_only=True,
            item_tower=NewsItemTower(words=WORDS, dim=8),
            user_tower=type(user_tower)(**({"heads": 2} if isinstance(user_tower, NRMSUserTower) else {})),
        )
        texts = ["red film 3", "unheard", ""]
        assert torch.equal(loaded.item_tower.encode_texts(texts), module.item_tower.encode_texts(texts))
