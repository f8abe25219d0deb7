import numpy as np
import pytest
from datasets import Dataset

from lightning_rec.data.catalogue import Catalogue
from lightning_rec.data.histories import build_histories
from lightning_rec.data.split import leave_one_out
from lightning_rec.data.user_text import UserTextMaker

TITLES = ["Red shoe", "Blue boot", "<b>Green</b> hat", "Old film"]


@pytest.fixture
def catalogue():
    return Catalogue.build(Dataset.from_dict({"item_id": list("abcd"), "title": TITLES}), list("abcd"))


def maker(catalogue, template, users=None, reviews=None, limit=10, cleaning=("html",), items=(1, 2, 3, 4)):
    histories = build_histories(np.ones(len(items), int), np.array(items), user_ids=["", "007"])
    return UserTextMaker(template, histories, catalogue, users, reviews, limit, list(cleaning))


def text(made, end, user=1):
    return made(np.array([user]), np.array([end]))[0]


def test_titles_before_the_moment_newest_first(catalogue):
    made = maker(catalogue, "Likes: {titles}", limit=2)
    assert [text(made, end) for end in range(5)] == [
        "",
        "Likes: Red shoe",
        "Likes: Blue boot, Red shoe",
        "Likes: Green hat, Blue boot",
        "Likes: Old film, Green hat",
    ]


def test_an_item_without_title_and_text_adds_nothing_and_titles_are_cleaned_as_the_catalogue():
    items = Dataset.from_dict({"item_id": ["a", "7", "c"], "title": ["A &amp; B", "", "C"], "text": ["", "", "long"]})
    catalogue = Catalogue.build(items, ["a"], "{text}", cleaning=["lower"])
    made = maker(catalogue, "Likes: {titles}", limit=2, items=(1, 2, 3, 2))
    assert [text(made, end) for end in range(5)] == ["", "Likes: a &amp; b", "Likes: a &amp; b", "Likes: c", "Likes: c"]


def test_lists_of_numbers_are_fields_of_a_profile_too(catalogue):
    users = Dataset.from_dict({"user_id": ["007"], "zones": [[3, 0, 12]]})
    assert text(maker(catalogue, "In {zones}", users), 0) == "In 3, 0, 12"


def test_profile_reviews_and_titles(catalogue):
    users = Dataset.from_dict({"user_id": ["1", "007"], "age": ["9", "30"], "job": [["x"], ["a", "b&amp;c"]]})
    made = maker(catalogue, "{age}, {job}. {titles}. {reviews}", users, ["good", None, "b&amp;d", ""], 3)
    assert text(made, 0) == "30, a, b&c"
    assert text(made, 4) == "30, a, b&c. Old film, Green hat, Blue boot. b&d good"
    assert text(made, 1) == "30, a, b&c. Red shoe. good"
    assert text(made, 0, user=0) == ""  # a user whom the data does not know


def test_the_newest_reviews_are_kept_even_when_many_events_have_none(catalogue):
    made = maker(catalogue, "{reviews}", reviews=["one", "two", "", None], limit=1)
    assert text(made, 4) == "two"
    assert text(made, 1) == "one"


def test_reviews_belong_to_the_event_and_not_to_its_place_in_the_history(catalogue):
    histories = build_histories(np.array([1, 2, 1]), np.array([1, 2, 3]), np.array([9, 5, 1]), user_ids=["", "a", "b"])
    made = UserTextMaker("{reviews}", histories, catalogue, None, ["late", "other", "early"], 5, [])
    assert made(np.array([1, 1, 2]), np.array([1, 2, 3])) == ["early", "late early", "other"]


def test_an_unknown_field_is_named(catalogue):
    with pytest.raises(ValueError, match=r"user_template names ages, but the fields are reviews, titles"):
        maker(catalogue, "{ages} {titles}")
    users = Dataset.from_dict({"user_id": ["a"], "age": ["1"]})
    with pytest.raises(ValueError, match="age, reviews, titles"):
        maker(catalogue, "{ages}", users)


@pytest.mark.parametrize("seed", range(3))
def test_a_text_never_holds_what_came_at_or_after_the_moment(seed):
    """Every title and review is unlike all others, so that a leak would show."""
    rng = np.random.default_rng(seed)
    n = 120
    ids = [f"i{row}" for row in range(n)]
    catalogue = Catalogue.build(Dataset.from_dict({"item_id": ids, "title": [f"<T{row}>" for row in range(n)]}), ids)
    order = rng.permutation(n)
    histories = build_histories(rng.integers(1, 8, n), order + 1, rng.integers(0, 30, n), user_ids=["", *"abcdefg"])
    reviews = [f"(R{row})" for row in range(n)]
    made = UserTextMaker("{titles} {reviews}", histories, catalogue, None, reviews, 4, [])
    split = leave_one_out(histories)
    for ends in (split.train_end, split.validation_end, split.train_end - 1):
        users = np.flatnonzero(ends > histories.indptr[:-1])
        for user, end, found in zip(users, ends[users], made(users, ends[users]), strict=True):
            events = histories.event[histories.indptr[user] : end]
            for row in range(n):
                named = f"(R{row})" in found
                assert named == (row in events[-4:])
            titles = set(histories.items[histories.indptr[user] : end][-4:].tolist())
            assert {
                row for row in range(1, n + 1) if catalogue.title(row) in found.split(" (R")[0].split(", ")
            } <= titles
