"""The life of a log of impressions, from MIND's files to batches and figures."""

import numpy as np
import pytest
import torch

from lightning_rec.data import AdsDataModule, ImpressionDataModule, NewsImpressionDataModule
from lightning_rec.data.collate import BatchIndex
from lightning_rec.data.readers import ImpressionFiles, Mind

MIND = "tests/data/files/mind"


@pytest.fixture
def mind(request):
    def make(part="", **options):
        data = NewsImpressionDataModule(path=str(request.config.rootpath / MIND / part), **options)
        data.setup()
        return data

    return make


def lines_of(request, part):
    text = (request.config.rootpath / MIND / part / "behaviors.tsv").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()]


def test_parts_are_those_of_the_files(mind, request):
    data = mind()
    for part, folder in (("train", "train"), ("validation", "dev"), ("predict", "test")):
        rows = lines_of(request, folder)
        assert [data.impressions.ids[number] for number in data.numbers(part)] == [row[0] for row in rows]
        assert [data.user_ids[data.impressions.users[number]] for number in data.numbers(part)] == [r[1] for r in rows]


def test_what_was_shown_and_clicked_in_every_impression(mind, request):
    data = mind()
    ids = data.catalogue.ids
    rows = lines_of(request, "dev")
    dataset = data.evaluation_dataset("validation")
    batch = dataset[BatchIndex(np.arange(len(dataset)), (0,))]
    for place, number in enumerate(batch.index.tolist()):
        candidates = [candidate.rsplit("-", 1) for candidate in rows[number][4].split()]
        size = int(batch.impressions.sizes[place])
        assert [ids[row] for row in batch.impressions.candidates[place, :size]] == [name for name, _ in candidates]
        assert batch.impressions.labels[place, :size].tolist() == [float(label) for _, label in candidates]
        history = rows[number][3].split()[-data.max_history :]
        length = int(batch.users.lengths[place])
        assert [ids[row] for row in batch.users.history[place, :length]] == history


def test_an_id_without_an_article_reads_as_empty_text_and_is_reported(mind, request):
    data = mind()
    known = {
        line.split("\t")[0]
        for part in ("train", "dev", "test")
        for line in (request.config.rootpath / MIND / part / "news.tsv").read_text(encoding="utf-8").splitlines()
    }
    shown = [c.rsplit("-", 1)[0] for row in lines_of(request, "dev") for c in row[4].split()]
    unknown = [name for name in shown if name not in known]
    assert unknown, "the invented files hold such ids"
    for name in unknown:
        assert data.catalogue.texts[data.catalogue.row(name)] == ""
    assert f"{len(unknown) / len(shown):.1%} of the candidates" in data.protocol


def test_training_counts_are_the_clicks_of_training(mind, request):
    data = mind()
    wanted = dict.fromkeys(data.catalogue.ids, 0)
    for row in lines_of(request, "train"):
        for candidate in row[4].split():
            name, label = candidate.rsplit("-", 1)
            wanted[name] += int(label)
    assert dict(zip(data.catalogue.ids, data.train_counts.tolist(), strict=True)) == wanted


def test_nothing_of_later_parts_reaches_training(mind):
    data = mind()
    before = list(data.train_dataloader())
    later = data.parts > 0
    for number in np.flatnonzero(later):
        part = slice(data.impressions.starts[number], data.impressions.starts[number + 1])
        data.impressions.labels[part] = 1
    after = list(data.train_dataloader())
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one.items.rows, two.items.rows)
        torch.testing.assert_close(one.impressions.popularity, two.impressions.popularity, equal_nan=True)
        torch.testing.assert_close(one.impressions.ages, two.impressions.ages, equal_nan=True)


def test_unlabelled_impressions_are_predicted_not_tested(mind, request):
    data = mind()
    with pytest.raises(ValueError, match="have no labels, so there is nothing to measure; predict works"):
        data.test_dataloader()
    batches = list(data.predict_dataloader())
    assert data.asked_impressions == [row[0] for row in lines_of(request, "test")]
    assert data.asked_users == [row[1] for row in lines_of(request, "test")]
    assert sorted(number for batch in batches for number in batch.index.tolist()) == list(range(len(data.asked_users)))
    assert all(batch.impressions.labels is None or batch.impressions.labels.isnan().all() for batch in batches)


def test_one_folder_is_split_by_time(mind):
    data = mind("train")
    times, parts = data.impressions.times, data.parts
    assert set(parts.tolist()) >= {0, 1, 2}
    assert times[parts == 0].max() < times[parts == 1].min() <= times[parts == 1].max() < times[parts == 2].min()
    assert "Global time" in data.protocol


def test_every_impression_is_evaluated_once_on_every_number_of_ranks(mind):
    from types import SimpleNamespace

    whole = mind()
    wanted = len(whole.evaluation_dataset("validation"))
    seen = []
    for rank in range(3):
        data = mind(eval_batch_size=2)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=3)
        seen += [number for batch in data.val_dataloader() for number in batch.index.tolist()]
    assert sorted(seen) == list(range(wanted))


def test_setting_up_twice_reads_once(mind):
    data = mind()
    catalogue = data.catalogue
    data.setup("test")
    assert data.catalogue is catalogue


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data.reader"),
        ({"path": "nowhere"}, "recognises no data set"),
        ({"path": "x", "max_history": 0}, "max_history"),
        ({"path": "x", "negatives": -1}, "negatives"),
        ({"path": "x", "max_candidates": 0}, "max_candidates"),
        ({"path": "x", "popularity_half_life": 0.0}, "popularity_half_life"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        ImpressionDataModule(**options).setup()


def test_fields_and_groups_of_the_view(mind):
    data = mind()
    view = data.view
    categories = data.catalogue.attribute("category")
    for one in range(1, len(categories)):
        assert (view.groups[one] == 0) == (not categories[one])
    assert set(view.fields) >= {"title", "abstract", "category", "entities"}
    row = next(row for row, abstract in enumerate(view.fields["abstract"]) if row and not abstract)
    assert view.fields["abstract"][row] == ""
    assert isinstance(view.fields["entities"][1], list)
    assert view.fields["title"][0] == ""


def test_news_and_ads_recognise_their_files(tmp_path, request):
    parts = str(request.config.rootpath / MIND)
    assert isinstance(NewsImpressionDataModule(path=parts).usual_reader(parts), Mind)
    (tmp_path / "impressions.jsonl").touch()
    with pytest.raises(ValueError, match="recognises no data set"):
        NewsImpressionDataModule(path="x").usual_reader(str(tmp_path))
    for name in ("articles.csv", "ads.parquet", "users.tsv"):
        (tmp_path / name).touch()
    reader = NewsImpressionDataModule(path="x").usual_reader(str(tmp_path))
    assert isinstance(reader, ImpressionFiles)
    assert (reader.items, reader.users) == (str(tmp_path / "articles.csv"), str(tmp_path / "users.tsv"))
    reader = AdsDataModule(path="x").usual_reader(str(tmp_path))
    assert isinstance(reader, ImpressionFiles)
    assert (reader.impressions, reader.items) == (str(tmp_path / "impressions.jsonl"), str(tmp_path / "ads.parquet"))
    (tmp_path / "clicks.jsonl").touch()  # which of the two is the log?
    with pytest.raises(ValueError, match="AdsDataModule recognises no data set"):
        AdsDataModule(path="x").usual_reader(str(tmp_path))


def test_titles_in_the_text_of_a_user_are_cleaned_as_the_data_says(mind, request):
    data = mind(user_template="Read {titles}", user_titles=3, cleaning=["whitespace", "lower"])
    titles = {}
    for part in ("test", "dev", "train"):
        for line in (request.config.rootpath / MIND / part / "news.tsv").read_text(encoding="utf-8").splitlines():
            titles[line.split("\t")[0]] = " ".join(line.split("\t")[3].lower().split())
    assert data.user_texts is not None
    rows = lines_of(request, "dev")
    wanted = []
    for row in rows:
        newest = [titles.get(name, "") for name in reversed(row[3].split()[-3:])]  # an unknown article has no title
        wanted.append("Read " + ", ".join(filter(None, newest)) if any(newest) else "")
    assert data.user_texts(data.numbers("validation")) == wanted
    assert any("Read " in text for text in wanted)
    assert data.catalogue.title(data.catalogue.row(rows[0][3].split()[0])).islower()


def test_a_user_template_names_fields_that_there_are(mind):
    with pytest.raises(ValueError, match="user_template names feedback, but the fields are titles"):
        mind(user_template="{titles} {feedback}")
