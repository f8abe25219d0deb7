import gzip
import zipfile

import pytest
import torch

from lightning_rec.towers import WordOptions, WordVectorEncoder
from lightning_rec.towers.word_vectors import words_of

TEXTS = ["", "Red shoe, red boot", "the old film of war", "Ein schönes Fahrrad", "!?", "red"]


def build(texts=TEXTS, **options):
    torch.manual_seed(0)
    given = {"dim": 6, "heads": 2, "head_dim": 4, "filters": 5, "hidden": 3} | options
    return WordVectorEncoder(WordOptions(**given), texts).eval()


def glove(folder, name="glove.txt", lines=("red 1 2 3", "boot 4 5 6", "New York 7 8 9", "zebra 0 0 0")):
    path = folder / name
    text = "".join(f"{line}\n" for line in lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("glove.txt", text)
            archive.writestr("README", "read me")
    else:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Red shoe, RED boot!", ["red", "shoe", "red", "boot"]),
        ("Trump's 2nd e-mail", ["trump", "s", "2nd", "e", "mail"]),
        ("Ёлка и снег", ["ёлка", "и", "снег"]),
        ("ein scho\u0308nes Rad", ["ein", "schönes", "rad"]),
        ("हिन्दी समाचार", ["हिन्दी", "समाचार"]),
        ("أخبار اليوم", ["أخبار", "اليوم"]),
        ("北京2024新闻", ["北", "京", "2024", "新", "闻"]),
        ("한국 뉴스", ["한국", "뉴스"]),
        ("😀 ... \n", []),
        ("", []),
    ],
)
def test_words_of_many_languages(text, words):
    assert words_of(text) == words


def test_the_vocabulary_is_the_frequent_words():
    assert list(build().words.rows)[:2] == ["red", "boot"]
    assert build().words.rows["red"] == 1
    assert list(build(min_count=2).words.rows) == ["red"]
    assert list(build(max_words=3).words.rows) == ["red", "boot", "ein"]
    assert build(list(reversed(TEXTS))).words.rows == build().words.rows


@pytest.mark.parametrize("encoder", ["attention", "cnn", "mean"])
def test_a_text_does_not_depend_on_its_neighbours(encoder):
    model = build(encoder=encoder)
    together = model.encode(TEXTS)
    assert together.shape == (6, {"attention": 8, "cnn": 5, "mean": 6}[encoder])
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(model.encode([text])[0], together[row])
    assert not together[[0, 4]].any(), "nothing to read, nothing said"
    assert together[[1, 2, 3, 5]].any(1).all()
    assert model.encode([]).shape == (0, model.width)
    table = model.tokenise(TEXTS)
    torch.testing.assert_close(model.encode_table(table, torch.tensor([5, 1, 5])), together[[5, 1, 5]])


def test_mean_by_hand():
    model = build(encoder="mean")
    torch.nn.init.normal_(model.unknown)
    vectors, rows = model.words.vectors, model.words.rows
    expected = (2 * vectors[rows["red"]] + vectors[rows["shoe"]] + model.unknown) / 4
    torch.testing.assert_close(model.encode(["red shoe UNHEARD red"])[0], expected)


def test_convolution_by_hand():
    model = build(encoder="cnn")
    x = model.words.vectors[[model.words.rows[word] for word in ("the", "old")]]
    weight, none = model.convolution.weight, torch.zeros(6)
    steps = []
    for left, middle, right in [(none, x[0], x[1]), (x[0], x[1], none)]:
        seen = torch.stack([left, middle, right], -1)
        steps.append(((weight * seen).sum((1, 2)) + model.convolution.bias).relu())
    torch.testing.assert_close(model.encode(["the old"])[0], model.pool(torch.stack(steps)))


def test_attention_by_its_parts():
    model = build()
    x = model.words.vectors[[model.words.rows[word] for word in ("red", "old", "red")]][None]
    mixed = model.mix(x)
    torch.testing.assert_close(model.encode(["red old red"]), model.pool(mixed))
    model.options.dropout = 0.0
    model.train()
    table = model.tokenise(["red old red"])
    torch.testing.assert_close(model.encode_table(table, torch.tensor([0])), model.pool(mixed))


def test_order_of_words_matters_to_the_convolution_only():
    for encoder, same in [("attention", True), ("mean", True), ("cnn", False)]:
        one, other = build(encoder=encoder).encode(["old film of war", "war of film old"])
        assert torch.allclose(one, other, atol=1e-6) == same


def test_texts_are_cut():
    model = build(max_length=2)
    torch.testing.assert_close(*model.encode(["red boot", "red boot the old film"]))


@pytest.mark.parametrize("encoder", ["attention", "cnn", "mean"])
def test_every_parameter_learns(encoder):
    model = build(encoder=encoder).train()
    table = model.tokenise([*TEXTS, "unheard red"])
    model.encode_table(table, torch.arange(7)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias added to all keys of an attention, or to all scores of a softmax, changes nothing.
        assert parameter.grad.any(), name
    assert not model.words.vectors.grad[0].any()


@pytest.mark.parametrize("name", ["glove.txt", "glove.txt.gz", "glove.zip"])
def test_ready_made_vectors(tmp_path, name):
    model = build(dim=3, vectors=glove(tmp_path, name))
    rows, vectors = model.words.rows, model.words.vectors
    assert vectors[rows["red"]].tolist() == [1, 2, 3]
    assert vectors[rows["boot"]].tolist() == [4, 5, 6]
    assert "zebra" not in rows
    assert "shoe" in rows, "it is learned"
    assert not vectors[0].any()


def test_coverage_is_reported(tmp_path, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        path = glove(tmp_path)
        build(["red red shoe", "boot shoe"], dim=3, vectors=path)
    assert (
        f"{path} has 2 of the 3 words of the catalogue (66.7 %), which are 60.0 % of their occurrences" in caplog.text
    )


def test_frozen_vectors_leave_unknown_words_out(tmp_path):
    model = build(dim=3, vectors=glove(tmp_path), tune=False)
    assert set(model.words.rows) == {"red", "boot"}
    assert "words.vectors" not in dict(model.named_parameters())
    torch.testing.assert_close(*model.encode(["red shoe", "red film"]))


def test_word2vec_header_capitals_and_repeats(tmp_path):
    lines = ["4 3", "Red 9 9 9", "red 1 2 3", "red 0 0 0", "BOOT 4 5 6 "]
    model = build(dim=3, vectors=glove(tmp_path, lines=lines))
    rows, vectors = model.words.rows, model.words.vectors
    assert vectors[rows["red"]].tolist() == [1, 2, 3]
    assert vectors[rows["boot"]].tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["red 1 2"], r"glove.txt, line 1: the vectors are 2 wide, but words.dim is 3: set words.dim to 2"),
        (["9 300", "red 1 2 3"], r"line 1: the vectors are 300 wide, but words.dim is 3"),
        (["the 1 2 3", "red 1 2"], r"line 2: the vectors are 2 wide"),
        (["the 1 2 3", "red 1 x 3"], r"line 2: a vector must be made of numbers .*'x'"),
        (["the 1 2 3", "red 1 nan 3"], r"line 2: .* finite numbers"),
    ],
)
def test_bad_vector_files(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        build(dim=3, vectors=glove(tmp_path, lines=lines))


def test_no_vector_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no vector file .*nowhere.txt: give a file in GloVe's"):
        build(vectors=str(tmp_path / "nowhere.txt"))
    path = tmp_path / "two.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.50d.txt", "")
        archive.writestr("a.100d.txt", "")
    with pytest.raises(ValueError, match=r"one file of vectors .* holds: a.50d.txt, a.100d.txt"):
        build(vectors=str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "words.dim must be at least 1"),
        ({"window": 2}, "words.window must be an odd number"),
        ({"tune": False}, "no vectors to keep"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("encoder", ["attention", "cnn", "mean"])
@pytest.mark.parametrize("tune", [True, False])
def test_the_vocabulary_travels_in_the_state(tmp_path, encoder, tune):
    options = {"dim": 3, "encoder": encoder, "tune": tune, "vectors": glove(tmp_path)}
    model = build(**options)
    new = ["red boot", "unheard schönes", ""]
    torch.save(model.state_dict(), tmp_path / "state")
    (tmp_path / "glove.txt").unlink()  # neither texts nor vectors are needed
    state = torch.load(tmp_path / "state", weights_only=True)
    fresh = build((), **options)
    assert len(fresh.words) == 0
    fresh.load_state_dict(state)
    assert fresh.words.rows == model.words.rows
    assert torch.equal(fresh.encode(new), model.encode(new))
    assert {name for name, _ in fresh.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert not torch.equal(model.encode(new), build((), **options).encode(new))
    other = build(["another catalogue of red"], **(options | {"vectors": glove(tmp_path)}))
    assert other.encode(["red boot"]).shape == (1, model.width)
    other.load_state_dict(state)
    assert torch.equal(other.encode(new), model.encode(new))


def test_a_state_of_another_width_is_refused():
    with pytest.raises(RuntimeError, match=r"size mismatch for words\.vectors"):
        build((), dim=4).load_state_dict(build().state_dict())


def test_an_empty_catalogue():
    model = build(["", "!"])
    assert model.encode(["red", ""]).isfinite().all()
