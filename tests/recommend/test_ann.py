"""Approximate indexes: never a wrong item, exact scores, and nearly all that the exact index finds."""

import pytest
import torch
from torch import Tensor

faiss = pytest.importorskip("faiss", reason="the extra `index` is not installed")

from lightning_rec.recommend import ann  # noqa: E402  # after faiss is there
from lightning_rec.recommend.ann import HnswIndex, IvfPqIndex, make_index  # noqa: E402  # likewise
from lightning_rec.recommend.index import ExactIndex  # noqa: E402  # likewise
from lightning_rec.recommend.recommender import Recommender  # noqa: E402  # likewise
from lightning_rec.recommend.types import Request  # noqa: E402  # likewise

IVFPQ = {"lists": 16, "bits": 4, "m": 4, "probes": 16, "rescore": 8}  # 624 items train it


def clustered(n: int, d: int = 16, seed: int = 0, users: int = 40) -> tuple[Tensor, Tensor]:
    """Item and interest vectors around common centres, the items of many lengths."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(30, d, generator=random)
    items = centres[torch.randint(30, (n,), generator=random)] + 0.7 * torch.randn(n, d, generator=random)
    items *= torch.exp(0.3 * torch.randn(n, 1, generator=random))
    interest = centres[torch.randint(30, (users,), generator=random)] + 0.7 * torch.randn(users, d, generator=random)
    return items, interest


@pytest.mark.parametrize(
    ("index", "least"),
    [(HnswIndex(ef_search=512), 0.9), (IvfPqIndex(**IVFPQ), 0.85), (HnswIndex(m=4, ef_search=1), 0.5)],
)
def test_recall(index, least, caplog):
    vectors, interest = clustered(4000)
    with caplog.at_level("INFO"):
        built = index.build(vectors)
    assert not built.exact
    assert least < built.recall <= 1
    assert f"recall@100 {built.recall:.4f} against exact" in caplog.text
    assert "on 500 drawn item vectors, for want of users" in caplog.text
    assert "4,000 items" not in caplog.text  # padding is none
    assert built.recall_at(10, interest) > least
    wanted = ExactIndex(vectors).search(interest, 10)[1]
    found = built.search(interest, 10)[1]
    share = sum(len(set(a) & set(b)) for a, b in zip(wanted.tolist(), found.tolist(), strict=True)) / wanted.numel()
    assert built.recall_at(10, interest) == share
    assert index.recall is None, "the index that was built from is as it was"


def test_recall_is_measured_on_interests_that_are_given(caplog):
    vectors, interest = clustered(1000)
    with caplog.at_level("INFO"):
        HnswIndex(interests=interest).build(vectors)
    assert "on 40 interest vectors" in caplog.text


@pytest.mark.parametrize("name", ["hnsw", "ivfpq"])
@pytest.mark.parametrize("seed", range(6))
def test_never_a_dead_or_excluded_item_and_never_fewer(name, seed):
    random = torch.Generator().manual_seed(seed)
    vectors, interest = clustered(1500, seed=seed)
    dead = torch.rand(1500, generator=random) < (0.3 if seed % 2 else 0.0)
    options = IVFPQ if name == "ivfpq" else {"m": 4, "ef_search": 4}
    index = make_index(name, **options).build(vectors, dead)
    assert not index.exact
    best = ExactIndex(vectors, dead).search(interest, 400)[1]
    # some exclude nothing, some what they would get, some nearly everything
    excluded = [best[user][: [0, 5, 60, 400][user % 4]] for user in range(len(interest))]
    excluded[0] = torch.arange(1, 1497)
    k = [1, 7, 30, 100, 1000, 3000][seed]
    scores, rows = index.search(interest, k, excluded)
    wanted, _ = ExactIndex(vectors, dead).search(interest, k, excluded)
    assert scores.shape == rows.shape == wanted.shape
    assert ((scores > -torch.inf).sum(1) == (wanted > -torch.inf).sum(1)).all()
    assert (rows[scores == -torch.inf] == 0).all()
    assert (scores.diff(dim=1) <= 0)[scores[:, 1:] > -torch.inf].all()
    for user in range(len(interest)):
        real = rows[user][scores[user] > -torch.inf]
        assert len(real.unique()) == len(real)
        assert real.all(), "padding"
        assert not dead[real].any()
        assert not torch.isin(real, excluded[user]).any()
        torch.testing.assert_close(vectors[real] @ interest[user], scores[user][: len(real)], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_as_exact_when_all_is_looked_at(seed):
    vectors, interest = clustered(800, seed=seed)
    excluded = [torch.randint(1, 800, (user % 5,)) for user in range(len(interest))]
    wanted = ExactIndex(vectors).search(interest, 10, excluded)
    for index in (HnswIndex(ef_construction=400, ef_search=800), IvfPqIndex(16, 4, 4, probes=16, rescore=36)):
        scores, rows = index.build(vectors).search(interest, 10, excluded)
        torch.testing.assert_close(scores, wanted[0], atol=1e-4, rtol=1e-5)
        assert torch.equal(rows, wanted[1])


@pytest.mark.parametrize("name", ["hnsw", "ivfpq"])
def test_a_changed_catalogue_is_followed_without_building_anew(name, caplog):
    vectors, interest = clustered(3000)
    first = make_index(name, **(IVFPQ if name == "ivfpq" else {})).build(vectors)
    top = first.search(interest[:1], 3)[1][0]
    dead = torch.zeros(3002, dtype=torch.bool)
    dead[top[0]] = True
    grown = torch.cat([vectors, 5 * interest[:1], -interest[:1]])
    grown[top[1]] = -vectors[top[1]]
    caplog.clear()
    with caplog.at_level("INFO"):
        second = first.build(grown, dead)
        third = second.build(grown, torch.zeros(3002, dtype=torch.bool))
    assert second._base is first._base is third._base
    assert "recall" not in caplog.text
    rows = second.search(interest[:1], 3)[1][0].tolist()
    assert rows[0] == 3000
    assert not {int(top[0]), int(top[1])} & set(rows)
    assert int(top[0]) in third.search(interest[:1], 3)[1][0]
    assert first.search(interest[:1], 3)[1][0].tolist() == top.tolist(), "a reader of the old state sees the old one"
    for index, out in ((second, dead), (third, None)):
        assert (index.search(interest, 200)[0] > -torch.inf).all()
        wanted = ExactIndex(grown, out).search(interest, 20)[1]
        found = index.search(interest, 20)[1]
        hits = sum(len(set(a) & set(b)) for a, b in zip(wanted.tolist(), found.tolist(), strict=True))
        assert hits / wanted.numel() > 0.85
    many = third.build(torch.cat([grown, vectors[1:1500]]))
    assert many._base is not first._base


def test_few_items_and_none():
    vectors, interest = clustered(100)
    with pytest.warns(UserWarning, match=r"needs 9,984 items to be trained, and there are 99: the exact index answers"):
        index = IvfPqIndex().build(vectors)
    assert index.exact
    assert index.recall is None
    torch.testing.assert_close(index.search(interest, 5), ExactIndex(vectors).search(interest, 5))
    grown = IvfPqIndex(**IVFPQ)
    with pytest.warns(UserWarning, match="exact index answers"):
        small = grown.build(vectors)
    assert not small.build(clustered(1000)[0]).exact, "it is built as soon as there are enough"
    for index in (HnswIndex(), HnswIndex().build(torch.zeros(1, 16)), HnswIndex().build(vectors, torch.ones(100) > 0)):
        scores, rows = index.search(torch.ones(2, index.vectors.shape[1]), 5)
        assert (scores == -torch.inf).all()
        assert not rows.any()
    assert HnswIndex().build(vectors).search(interest[:0], 5)[0].shape == (0, 5)


def test_settings_of_faiss_are_left_alone():
    threads, torch_threads = faiss.omp_get_max_threads(), torch.get_num_threads()
    vectors, interest = clustered(700)
    for name, options in (("hnsw", {}), ("ivfpq", IVFPQ)):
        make_index(name, **options).build(vectors).search(interest, 3)
    assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == (threads, torch_threads)


def test_names_and_options():
    assert isinstance(make_index("exact"), ExactIndex)
    assert make_index("hnsw", m=8).m == 8
    with pytest.raises(ValueError, match="no index 'tree': choose one of exact, hnsw, ivfpq"):
        make_index("tree")
    with pytest.raises(ValueError, match="exact index has no options, but got m"):
        make_index("exact", m=8)
    with pytest.raises(ValueError, match="does not take these options"):
        make_index("hnsw", probes=8)
    with pytest.raises(ValueError, match="m=1"):
        HnswIndex(m=1)
    with pytest.raises(ValueError, match="bits=0"):
        IvfPqIndex(bits=0)
    with pytest.raises(ValueError, match="m = 5 does not divide"):
        IvfPqIndex(m=5, bits=4).build(clustered(900)[0])


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r'pip install "lightning_rec\[index\]"'):
        make_index("hnsw")


def test_recall_is_measured_on_interests_of_users(artefact_of, caplog, monkeypatch):
    folder = artefact_of("text_pooled")
    monkeypatch.setattr(ann, "_SAMPLE", 7)
    index = make_index("hnsw")
    with caplog.at_level("INFO"):
        graph = Recommender.load(folder, index)
    assert "on 7 interest vectors" in caplog.text
    assert index.interests is None
    users = graph.artefact.users
    everyone = [Request(user=user) for user in users.ids]
    known = torch.stack([found.vector for found in graph.interests.read(everyone, graph.state)])
    assert (torch.cdist(graph.state.index.interests, known).amin(1) < 0.02).all(), "vectors of length 13"
    own = torch.randn(3, graph.artefact.manifest.dim)
    caplog.clear()
    with caplog.at_level("INFO"):
        Recommender.load(folder, make_index("hnsw", interests=own))
    assert "on 3 interest vectors" in caplog.text
    again = Recommender.load(artefact_of("id_sequence"), graph.state.index)  # of another width, as after a swap
    assert again.state.index.interests.shape == (7, again.artefact.manifest.dim)
    graph.artefact.users = None  # as without the file
    caplog.clear()
    with caplog.at_level("INFO"):
        Recommender(graph.artefact, make_index("hnsw"))
    assert "drawn item vectors, for want of users" in caplog.text


def test_a_recommender_over_a_graph(artefact_of):
    folder = artefact_of("text_pooled")
    exact, graph = Recommender.load(folder), Recommender.load(folder, make_index("hnsw"))
    requests = [Request(user=user, k=5) for user in exact.artefact.users.sample(8)]
    for wanted, found in zip(exact.recommend(requests), graph.recommend(requests), strict=True):
        assert [item.id for item in found.items] == [item.id for item in wanted.items]
    assert not isinstance(graph.state.index, ExactIndex)
    assert len(graph.state.index.interests) == len(exact.artefact.users.sample(10**9))
    graph.add_items([{"item_id": "new", "title": "Green tea of spring"}])
    graph.remove_items([graph.artefact.ids[1]])
    ids = [item.id for item in graph.recommend(Request(text="green tea", k=50)).items]
    assert "new" in ids
    assert graph.artefact.ids[1] not in ids
