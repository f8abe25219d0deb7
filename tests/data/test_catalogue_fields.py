import pytest
from datasets import Dataset

from lightning_rec.data.catalogue import Catalogue
from lightning_rec.data.catalogue_fields import Fields


def items(**columns):
    rows = {"item_id": ["a", "b"], "title": ["<b>One</b>", None], "names": [["x &amp; y", "", None], None]}
    return Dataset.from_dict(rows | columns)


def test_fields_are_cleaned_and_padded():
    fields = Fields(items(year=[1999, None], published=[5, 6]), 4, ["html"])
    assert list(fields) == ["title", "names", "year"]
    assert len(fields) == 3
    assert fields["title"] == ["", "One", "", ""]
    assert fields["names"] == [[], ["x & y"], [], []]
    assert fields["year"] == ["", "1999", "", ""]
    assert fields["title"] is fields["title"]  # read once
    with pytest.raises(KeyError):
        fields["published"]
    with pytest.raises(KeyError):
        fields["nothing"]


def test_no_table_has_no_fields():
    fields = Fields(None, 3, [])
    assert dict(fields) == {}
    catalogue = Catalogue(["", "a"], ["", "x"])
    assert dict(catalogue.view().fields) == {}
    assert catalogue.view().groups is None


def built(table, **options):
    return Catalogue.build(table, ["a", "b"], template="{title}", **options)


def test_the_digest_follows_fields_that_are_in_no_text():
    one = built(items())
    assert built(items()).digest == one.digest == one.view().digest
    others = [
        built(items(names=[["x"], None])),
        built(items(more=["m", None])),
        built(items(names=[[], ["x &amp; y", "", None]])),
        built(items(), cleaning=[]),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 5
    assert all(other.texts == one.texts for other in others[:3])


def test_the_digest_does_not_depend_on_chunks_and_selections():
    whole = items()
    table = Dataset.from_dict({name: [*whole[name][:][::-1], *whole[name][:]] for name in whole.column_names})
    assert built(table.select([1, 0])).digest == built(whole).digest
    assert built(table.select([2, 3])).digest == built(whole).digest


def test_groups_are_numbered_by_first_appearance():
    table = Dataset.from_dict(
        {
            "item_id": list("abcde"),
            "category": ["news", None, "sport", "news", " "],
            "tags": [["t", "u"], [], ["u"], None, ["t"]],
        }
    )
    catalogue = Catalogue.build(table, ["x"], unknown_items="add")
    assert catalogue.view().groups.tolist() == [0, 1, 0, 2, 1, 0, 0]
    assert catalogue.groups("tags").tolist() == [0, 1, 0, 2, 0, 1, 0]
    assert catalogue.groups("brand") is catalogue.groups(None) is None
