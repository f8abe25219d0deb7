import json

import numpy as np
import pytest

from lightning_rec.data import EcommerceDataModule, NewsDataModule, RecDataModule, VideoDataModule
from lightning_rec.data.readers import AmazonReviews, Files, MovieLens, SequenceFiles


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def ready():
    def make(kind, **options):
        data = kind(**options)
        data.setup()
        return data

    return make


def histories(data):
    return {
        user: [data.catalogue.ids[row] for row in data.histories.history(number)]
        for number, user in enumerate(data.user_ids)
        if user
    }


@pytest.fixture
def movielens(tmp_path):
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,10,5,100000001\n1,20,0.5,100000002\n1,30,3,100000003\n2,10,4,100000001\n"
    )
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n10,"Film, The (1990)",Drama|War\n20,Other (no year),(no genres listed)\n'
        "30,Third (2001),\n"
    )
    return tmp_path


def test_films_that_were_rated_were_watched(ready, movielens):
    data = ready(VideoDataModule, path=str(movielens))
    assert isinstance(data.usual_reader(str(movielens)), MovieLens)
    assert histories(data) == {"1": ["10", "20", "30"], "2": ["10"]}
    assert data.touched is None
    # the template names an overview, which this set has not, and skips the year and the genres that are missing
    assert data.catalogue.texts == ["", "The Film (1990). Drama, War", "Other (no year)", "Third (2001)"]
    # of what is trained on: the 0.5 is a validation rating
    assert data.rating_range == (4.0, 5.0)
    liked = ready(VideoDataModule, path=str(movielens), min_rating=3)
    assert histories(liked)["1"] == ["10", "30"]
    assert liked.touched.items.tolist() == [liked.catalogue.row("20")]


def test_amazon_reviews_of_three_stars_are_positive(ready, tmp_path):
    write_lines(
        tmp_path / "Tools_5.json",
        [
            {"reviewerID": "A", "asin": item, "overall": stars, "unixReviewTime": 100_000_000 + when, "reviewText": "x"}
            for when, (item, stars) in enumerate([("B1", 5.0), ("B2", 2.0), ("B3", 3.0)])
        ],
    )
    write_lines(
        tmp_path / "meta_Tools.json",
        [
            {"asin": "B1", "title": "Saw", "brand": "Acme", "category": ["Tools", "Saws"], "description": ["Cuts."]},
            {"asin": "B2", "title": "Nail"},
            {"asin": "B3", "brand": "Acme"},
        ],
    )
    data = ready(EcommerceDataModule, path=str(tmp_path))
    assert isinstance(data.usual_reader(str(tmp_path)), AmazonReviews)
    assert histories(data) == {"A": ["B1", "B3"]}
    assert data.catalogue.texts == ["", "Saw. Acme. Tools, Saws. Cuts.", "Nail", "Acme"]
    assert data.touched.items.tolist() == [data.catalogue.row("B2")]
    # the domain's rule is a default: a lower bound lets everything in
    assert histories(ready(EcommerceDataModule, path=str(tmp_path), min_rating=0))["A"] == ["B1", "B2", "B3"]


def test_sequence_files_of_a_shop(ready, tmp_path):
    (tmp_path / "Shop.inter.json").write_text(json.dumps({"0": ["7", "8", "7"], "1": ["9"]}))
    (tmp_path / "Shop.item.json").write_text(json.dumps({"7": {"title": "Pen"}, "8": {"title": "Ink", "brand": "X"}}))
    data = ready(EcommerceDataModule, path=str(tmp_path))
    assert isinstance(data.usual_reader(str(tmp_path)), SequenceFiles)
    assert histories(data) == {"0": ["7", "8", "7"], "1": []}  # no stars: every purchase counts; 9 is not in the table
    assert data.catalogue.texts == ["", "Pen", "Ink. X"]
    assert data.catalogue.report["unknown_interactions"] == 1


def test_clicks_on_articles(ready, tmp_path):
    (tmp_path / "clicks.tsv").write_text("reader\tuser_id\tarticle_id\nx\tu1\ta1\ny\tu1\ta2\n")
    (tmp_path / "articles.csv").write_text('article_id,title,category,body\na1,Rain,weather,"It rains."\na2,,sport,\n')
    with pytest.raises(ValueError, match=r"needs times.*set data\.split: leave_one_out"):
        ready(NewsDataModule, path=str(tmp_path))
    data = ready(NewsDataModule, path=str(tmp_path), split="leave_one_out")
    assert data.lifetimes is None, "without times every article is a candidate"
    assert isinstance(data.usual_reader(str(tmp_path)), Files)
    assert histories(data) == {"u1": ["a1", "a2"]}
    assert data.catalogue.texts == ["", "Rain. weather. It rains.", "sport"]


@pytest.mark.parametrize("kind", [EcommerceDataModule, NewsDataModule, RecDataModule])
def test_an_unrecognised_folder_is_an_error_that_names_the_remedy(kind, tmp_path):
    data = kind(path=str(tmp_path))
    with pytest.raises(ValueError, match=f"{kind.__name__} recognises no data set at .*set data.reader"):
        data.setup()


def test_a_template_of_ones_own_must_fit_the_table(ready, movielens):
    assert ready(VideoDataModule, path=str(movielens), template="{genres}").catalogue.texts[1] == "Drama, War"
    with pytest.raises(ValueError, match=r"names the field 'titel'.*title"):
        ready(VideoDataModule, path=str(movielens), template="{titel}")


class PodcastDataModule(RecDataModule):
    """A domain is its template, its positive rule and its files."""

    default_template = "{show}: {title}"

    def usual_reader(self, path):
        return Files(f"{path}/plays.csv", items=f"{path}/episodes.csv", interaction_columns={"share": "share"})

    def positive(self, interactions):
        return np.array([float(share) >= 0.5 for share in interactions["share"][:]])


def test_a_domain_of_ones_own(ready, tmp_path):
    (tmp_path / "plays.csv").write_text("user_id,item_id,share\nu,e1,0.9\nu,e2,0.1\nu,e3,0.5\n")
    (tmp_path / "episodes.csv").write_text("item_id,show,title\ne1,News,One\ne2,News,Two\ne3,,Three\n")
    data = ready(PodcastDataModule, path=str(tmp_path))
    assert histories(data) == {"u": ["e1", "e3"]}
    assert data.catalogue.texts == ["", "News: One", "News: Two", "Three"]
    assert data.touched.items.tolist() == [2]
