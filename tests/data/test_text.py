import math

import pytest

from lightning_rec.data.text import Template, cut_text, make_cleaner, user_text

FOUR = Template("{title}. {brand}. {categories}. {description}")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"title": "Soap", "brand": "B", "categories": ["x", "y"], "description": "d."}, "Soap. B. x, y. d."),
        ({"title": "Soap", "description": "d"}, "Soap. d"),
        ({"title": "Soap"}, "Soap"),
        ({"brand": "B", "categories": []}, "B"),
        ({"description": "d"}, "d"),
        ({}, ""),
        ({"title": None, "brand": math.nan, "categories": ["", None], "description": "  "}, ""),
        ({"title": "Help!", "brand": "B"}, "Help! B"),
        ({"title": "Mr.", "brand": "Who?", "description": "d"}, "Mr. Who? d"),
        ({"title": 'He said "go."', "brand": "B"}, 'He said "go." B'),
        ({"title": "Wait…", "brand": "好。", "description": "d"}, "Wait… 好。 d"),
        ({"title": "null", "brand": "NA"}, "null. NA"),
        ({"title": 7, "brand": 2.5, "description": False}, "7. 2.5. False"),
    ],
)
def test_template_skips_what_is_missing(row, expected):
    assert FOUR.render(row) == expected


FILM = Template("{title} ({year}). Genres: {genres}")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"title": "Alien", "year": "1979", "genres": ["Horror", "Sci-Fi"]}, "Alien (1979). Genres: Horror, Sci-Fi"),
        ({"title": "Alien", "genres": "Horror"}, "Alien. Genres: Horror"),
        ({"title": "Alien", "year": "1979"}, "Alien (1979)"),
        ({"year": "1979"}, "(1979)"),
        ({"genres": "Horror"}, "Genres: Horror"),
    ],
)
def test_labels_and_brackets_go_with_their_value(row, expected):
    assert FILM.render(row) == expected


def test_a_label_before_the_first_and_after_the_last_field():
    template = Template("Film: {title}, by {author}.")
    assert template.render({"title": "A", "author": "B"}) == "Film: A, by B."
    assert template.render({"title": "A", "author": "B Jr."}) == "Film: A, by B Jr."
    assert template.render({"title": "A"}) == "Film: A"
    assert template.render({"author": "B"}) == "by B."


def test_a_doubled_mark_is_left_out():
    template = Template("{a}, {b}; {c}: {d}")
    assert template.render({"a": "x,", "b": "y;", "c": "z:", "d": "w"}) == "x, y; z: w"


def test_braces_and_fields():
    template = Template("{{{title}}} {year} {title}")
    assert template.fields == ["title", "year"]
    assert template.render({"title": "A", "year": 1}) == "{A} 1 A"


@pytest.mark.parametrize("text", ["", "plain", "{title", "title}", "{}", "{title!r}", "{year:d}"])
def test_bad_templates_are_named(text):
    with pytest.raises(ValueError, match="template"):
        Template(text)


def test_unknown_fields_are_named_with_the_columns():
    with pytest.raises(ValueError, match=r"'titel', which the item table .* Did you mean 'title'\?.*: title, year\."):
        Template("{titel}").check(["title", "year"])
    FILM.check(["genres", "title", "year", "more"])


def test_max_chars():
    template = Template("{title}. {text}", max_chars={"text": 9})
    assert template.render({"title": "a long title indeed", "text": "one two three"}) == "a long title indeed. one two"
    assert Template("{a} {b}", max_chars=2).render({"a": "红楼梦", "b": "xyz"}) == "红楼 xy"
    assert cut_text("one two", 3) == "one"
    assert cut_text("abcdefgh ij", 10) == "abcdefgh"
    with pytest.raises(ValueError, match=r"'txt'.*Did you mean 'text'"):
        Template("{text}", max_chars={"txt": 9})


def test_a_field_of_markup_only_is_missing_after_cleaning():
    cleaner = make_cleaner()
    assert FOUR.render({"title": "<br>", "brand": "A&amp;B", "categories": ["<p></p>", "x"]}, cleaner) == "A&B. x"


def test_columns_render_like_rows():
    rows = [{"title": "Help!", "year": "1979", "genres": ["x"]}, {"title": None, "year": "", "genres": None}]
    columns = {name: [row[name] for row in rows] for name in FILM.fields}
    assert FILM.render_columns(columns) == [FILM.render(row) for row in rows] == ["Help! (1979). Genres: x", ""]


USER = "{age} {occupation}. Likes: {titles}. Wrote: {reviews}"


def test_user_text_keeps_the_newest_and_puts_it_first():
    text = user_text({"age": 24, "occupation": "artist"}, ["r1", "r2", "r3"], ["t1", "t2", "t3"], USER, 2, 1)
    assert text == "24 artist. Likes: t3, t2. Wrote: r3"


def test_user_text_skips_what_is_missing():
    assert user_text(None, [], [], USER) == ""
    assert user_text(None, ["good"], [], USER) == "Wrote: good"
    assert user_text({"occupation": "nurse"}, ["", "<p>ok</p>"], ["", "A"], USER, cleaner=make_cleaner()) == (
        "nurse. Likes: A. Wrote: ok"
    )
