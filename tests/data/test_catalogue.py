import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from lightning_rec.data.catalogue import Catalogue, encode_ids


@pytest.fixture
def items():
    return Dataset.from_dict(
        {
            "item_id": ["001", "1", "1.0", "5863"],
            "title": ["null", "NA", None, "<br>"],
            "genres": [["x", "y"], None, [], []],
        }
    )


def test_rows_follow_the_table_and_ids_stay_strings(items):
    catalogue = Catalogue.build(items, ["1", "1", "5863"], "{title}. {genres}")
    assert catalogue.ids == ["", "001", "1", "1.0", "5863"]
    assert catalogue.texts == ["", "null. x, y", "NA", "", ""]
    assert len(catalogue) == 5
    assert [catalogue.row(id_) for id_ in ("001", "1", "1.0", "5863")] == [1, 2, 3, 4]
    assert catalogue.report["untouched_items"] == 2
    assert catalogue.report["empty_texts"] == catalogue.empty_texts == 2


def test_unknown_items_are_dropped_or_added_and_counted(items):
    ids = ["x", "1", "y", "x", "001"]
    dropped = Catalogue.build(items, ids, "{title}", unknown_items="drop")
    assert dropped.rows(ids).tolist() == [0, 2, 0, 0, 1]
    assert (dropped.report["unknown_items"], dropped.report["unknown_interactions"]) == (2, 3)
    assert dropped.report["added_items"] == 0
    added = Catalogue.build(items, ids, "{title}", unknown_items="add")
    assert added.rows(ids).tolist() == [5, 2, 6, 5, 1]
    assert added.rows(ids).dtype == np.int64
    assert added.texts[5:] == ["", ""]
    assert added.attribute("title") == [None, "null", "NA", None, "<br>", None, None]
    assert added.report["added_items"] == 2
    assert added.examples["unknown_items"] == ["x", "y"]
    with pytest.raises(ValueError, match="'drop' or 'add'"):
        Catalogue.build(items, ids, unknown_items="keep")


def test_the_first_of_repeated_ids_is_kept_and_the_others_counted():
    items = Dataset.from_dict({"item_id": ["a", "b", "a", "c", "a"], "title": ["A", "B", "A2", "C", "A3"]})
    catalogue = Catalogue.build(items, [], "{title}")
    assert catalogue.texts == ["", "A", "B", "C"]
    assert catalogue.attribute("title") == [None, "A", "B", "C"]
    assert catalogue.report["duplicate_items"] == 2
    assert catalogue.examples["duplicate_items"] == ["a", "a"]


def test_a_filtered_table_is_read_through_its_indices(items):
    catalogue = Catalogue.build(items.select([3, 0]), ["1"], "{title}", cleaning=[])
    assert catalogue.ids == ["", "5863", "001"]
    assert catalogue.texts == ["", "<br>", "null"]


def test_without_a_table_items_come_in_the_order_of_first_appearance():
    catalogue = Catalogue.build(None, ["b", "a", "b", "c"])
    assert catalogue.ids == ["", "b", "a", "c"]
    assert catalogue.texts == [""] * 4
    assert catalogue.display(2) == "a"
    with pytest.raises(ValueError, match="there is no item table"):
        catalogue.attribute("title")


def test_without_a_template_all_fields_are_joined(items):
    assert Catalogue.build(items, []).texts == ["", "null. x, y", "NA", "", ""]
    assert Catalogue.build(items.select_columns(["item_id"]), []).texts == [""] * 5


def test_ids_are_taken_from_any_kind_of_column():
    ids = ["é", "b", "é"]
    table = Dataset.from_dict({"item_id": ids})
    kinds = (ids, tuple(ids), np.array(ids), np.array(ids, object), pa.array(ids), pa.chunked_array([ids[:1], ids[1:]]))
    for kind in (*kinds, table["item_id"], pa.chunked_array([], pa.string())):
        codes, distinct = encode_ids(kind)
        assert [distinct[code] for code in codes] in (ids, [])
    with pytest.raises(ValueError, match="1 of 2 ids are null, the first in row 1"):
        encode_ids(["a", None])
    for numbers in ([1, 2], np.array([1.0]), pa.array([1])):
        with pytest.raises(ValueError, match="Ids are strings"):
            encode_ids(numbers)


def test_bad_tables_are_named(items):
    with pytest.raises(ValueError, match="no column 'item_id'; its columns are: title, genres"):
        Catalogue.build(items.remove_columns("item_id"), [])
    with pytest.raises(ValueError, match="type int64"):
        Catalogue.build(Dataset.from_dict({"item_id": [1]}), [])
    with pytest.raises(ValueError, match="Row 1 of the item table has no item_id"):
        Catalogue.build(Dataset.from_dict({"item_id": ["a", None]}), [])
    with pytest.raises(ValueError, match="Interaction 1 has an empty item id"):
        Catalogue.build(items, ["1", ""])
    with pytest.raises(ValueError, match=r"'titel'.*Did you mean 'title'.*item_id, title, genres"):
        Catalogue.build(items, [], "{titel}")


def test_an_unknown_id_is_named_with_its_neighbours(items):
    catalogue = Catalogue.build(items, [])
    with pytest.raises(ValueError, match=r"no item with the id '5836'.*'5863'"):
        catalogue.row("5836")
    with pytest.raises(ValueError, match="strings as in '1'; this one is of type int"):
        catalogue.row(1)
    with pytest.raises(ValueError, match="without the white space"):
        catalogue.row(" 1 ")
    with pytest.raises(ValueError, match="no item with the id ''"):
        catalogue.row("")
    accents = Catalogue.build(None, ["caf\u00e9", "cafe\u0301", "ma\u00f1ana"])
    assert accents.rows(["caf\u00e9", "cafe\u0301"]).tolist() == [1, 2]
    with pytest.raises(ValueError, match="another Unicode normal form"):
        accents.row("man\u0303ana")


def test_display_takes_the_title_then_the_text_then_the_id():
    items = Dataset.from_dict(
        {"item_id": ["a", "b", "c"], "title": ["Tom &amp; Jerry", "", None], "text": ["", "w " * 90, ""]}
    )
    catalogue = Catalogue.build(items, [], "{text}")
    assert catalogue.display(1) == "Tom & Jerry"
    assert len(catalogue.display(2)) <= 80
    assert catalogue.display(2).startswith("w w w")
    assert catalogue.display(3) == "c"
    assert catalogue.display(0) == ""


def test_a_title_for_a_language_model_is_cleaned_as_the_texts_and_is_never_an_id():
    items = Dataset.from_dict(
        {
            "item_id": list("abcdef"),
            "title": ["Tom &amp; Jerry", "", None, " <i></i> ", "", "Both"],
            "name": [None, "A <b>NAME</b>", None, None, None, "not this"],
            "text": ["", "", "W&amp;W " * 20, "&amp;lt;", "", ""],
        }
    )
    plain = Catalogue.build(items, ["x"], "{text}", unknown_items="add")
    # an entity is decoded once: the text was cleaned already
    assert [plain.title(row) for row in range(8)] == [
        "", "Tom & Jerry", "A NAME", ("W&W " * 20).strip(), "&lt;", "", "Both", "",
    ]  # fmt: skip
    lower = Catalogue.build(items, [], "{text}", cleaning=["lower"])
    assert lower.title(1) == "tom &amp; jerry"
    assert lower.title(2) == "a <b>name</b>"
    # 80 characters at most, between words: ten of eight characters would end in a space
    assert lower.title(3) == ("w&amp;w " * 10).strip()
    assert lower.title(4) == "<i></i>"
    assert lower.display(1) == "Tom & Jerry"
    assert Catalogue.build(None, ["b"]).title(1) == ""


def test_digest_covers_content_order_and_borders_and_is_stable_across_processes():
    def digest(*texts):
        return Catalogue(["", *map(str, range(len(texts)))], ["", *texts]).digest

    assert digest("ab", "c") == digest("ab", "c")
    assert len({digest("ab", "c"), digest("a", "bc"), digest("c", "ab"), digest("abc"), digest("ab", "c", "")}) == 5
    # written down in another process: str's own hash would differ in this one
    assert digest("é") == "e3789686947939017cb41a8d38f337d973be0f97889eff0b34d981ae940609df"
    assert Catalogue(["", "b"], ["", "é"]).ids_digest != Catalogue(["", "a"], ["", "é"]).ids_digest


def test_view():
    catalogue = Catalogue(["", "a"], ["", "A"])
    view = catalogue.view(np.array([0, 3]), n_users=7, rating_range=(1.0, 5.0))
    assert (view.n_rows, view.n_users, list(view.texts), view.rating_range) == (2, 7, ["", "A"], (1.0, 5.0))
    assert torch.equal(view.counts, torch.tensor([0, 3]))
    assert view.digest == catalogue.digest
    assert catalogue.view().counts is None
    with pytest.raises(ValueError, match="2 rows"):
        catalogue.view(np.zeros(3))


def test_a_malformed_catalogue_is_refused():
    for ids, texts in ((["a"], [""]), ([], []), (["", "a"], [""]), (["", "a", "a"], [""] * 3), (["", ""], ["", ""])):
        with pytest.raises(ValueError, match=r"catalogue|padding"):
            Catalogue(ids, texts)
    with pytest.raises(ValueError, match="item table has 2 rows"):
        Catalogue(["", "a"], ["", "A"], Dataset.from_dict({"item_id": ["a", "b"]}))


def test_a_large_catalogue_is_built_without_touching_rows_one_by_one():
    n = 100_000
    items = Dataset.from_dict({"item_id": [f"i{i}" for i in range(n)], "title": [f"Title {i}" for i in range(n)]})
    start = time.perf_counter()
    catalogue = Catalogue.build(items, items["item_id"][::-1] * 2, "{title}. {item_id}")
    assert time.perf_counter() - start < 20  # two seconds on a slow core; a row at a time takes minutes
    assert catalogue.texts[n] == f"Title {n - 1}. i{n - 1}"
