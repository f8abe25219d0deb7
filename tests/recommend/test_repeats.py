"""What a run learned about repeats: in training, in figures and predictions, and in the answers of its artefact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from lightning_rec import EcommerceDataModule, TwoTower
from lightning_rec.cli import main
from lightning_rec.data.readers import Files
from lightning_rec.gather import history_columns
from lightning_rec.impression import ImpressionTwoTower
from lightning_rec.objectives import BPR, Softmax
from lightning_rec.recommend import Recommender, Request
from lightning_rec.recommend.ann import make_index
from lightning_rec.recommend.export import export
from lightning_rec.towers import IdItemTower, PooledUserTower, SequenceUserTower
from lightning_rec.towers.score import Cosine, Dot

SHOP = Path(__file__).parent.parent / "data" / "files" / "shop"
LEARNED = {
    "\ndata:\n": """
    objective: {class_path: lightning_rec.objectives.Softmax, init_args: {exclude_known: false}}
    score: {class_path: lightning_rec.towers.score.Dot, init_args: {learn_repeats: true}}
data:
""",
    "min_rating: 0": "min_rating: 0\n    filter_seen: false",
}


def test_history_columns_by_hand() -> None:
    table = torch.tensor([0, 9, 2, 8, 5, 7])  # catalogue rows at positions 0 .. 5; the first four are candidates
    history = torch.tensor([[4, 5, 1, 0], [2, 2, 0, 0]])
    columns = history_columns(history, table, table[1:5], 11, whole=False)
    assert columns.tolist() == [[3, -1, 0, -1], [1, 1, -1, -1]]
    assert history_columns(torch.tensor([[3, 1, 0]]), table, table, 11, whole=True).tolist() == [[2, 0, -1]]


@pytest.mark.parametrize("user_tower", [SequenceUserTower(blocks=1, heads=1, max_length=8), PooledUserTower()])
def test_the_loss_knows_no_later_event(user_tower: torch.nn.Module) -> None:
    """The loss equals a loop in which each step adds the value to the items of its own past."""
    torch.manual_seed(0)
    module = TwoTower(IdItemTower(8, init_std=0.5), user_tower, Softmax(exclude_known=False), Dot(learn_repeats=True))
    data = EcommerceDataModule(
        Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv")), min_rating=0, batch_size=10, max_history=8
    )
    data.prepare_data()
    data.setup("fit")
    module.build(data.view)
    module.eval()
    weight = module.score.repeat_weight
    assert weight is not None
    weight.data.fill_(-0.2)
    batch = next(iter(data.train_dataloader()))
    interest, items = module(batch)
    losses = []
    for user in range(len(batch.users)):
        length = int(batch.users.lengths[user])
        steps = range(length) if interest.shape[1] > 1 else [length - 1]
        for step in steps:
            target = int(batch.targets[user, step])
            if not target:
                continue
            past = set(batch.users.history[user, : step + 1].tolist())
            vector = interest[user, step if interest.shape[1] > 1 else 0]
            scores = items[1:] @ vector
            scores = scores + torch.tensor([-2.0 if place in past else 0.0 for place in range(1, len(items))])
            losses.append(-torch.log_softmax(scores, 0)[target - 1])
    loss = module.loss(batch)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert torch.autograd.grad(loss, weight)[0] != 0


@pytest.fixture(scope="module")
def fitted(run_of: Callable[..., Path]) -> Path:
    """A run with a value far enough from zero that it changes every list."""
    checkpoint = run_of("id_sequence", LEARNED)
    state = torch.load(checkpoint, weights_only=True)
    assert "score.repeat_weight" in state["state_dict"]
    state["state_dict"]["score.repeat_weight"].fill_(0.05)  # half a point: repeats win, and not all of them
    changed = checkpoint.with_name("changed.ckpt")
    torch.save(state, changed)
    return changed


@pytest.fixture(scope="module")
def folder(fitted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("repeats") / "artefact"
    export(fitted, output, progress=False)
    return output


def _brute(recommender: Recommender, ids: list[str], k: int) -> list[tuple[str, float]]:
    state = recommender.state
    interest = recommender.interests.read([Request(history=ids)], state)[0]
    scores = state.ready @ interest.vector
    for id_ in set(ids[-recommender.artefact.manifest.max_history :]):
        scores[state.rows[id_]] += 0.5
    order = [row for row in scores.argsort(descending=True).tolist() if row][:k]
    return [(state.ids[row], float(scores[row])) for row in order]


@pytest.mark.parametrize("index", ["exact", "hnsw"])
def test_answers_of_the_artefact(folder: Path, index: str) -> None:
    if index == "hnsw":
        pytest.importorskip("faiss", reason="the extra index is not installed")
    recommender = Recommender.load(folder, make_index(index))  # type: ignore[arg-type]
    ids = recommender.artefact.ids[1:]
    histories = [ids[:3], [ids[5], ids[5], ids[7]], ids[:12], [ids[-1]]]
    plain = recommender.recommend([Request(history=history, k=6) for history in histories])
    for history, answer in zip(histories, plain, strict=True):
        wanted = _brute(recommender, history, 6)
        assert [item.id for item in answer.items] == [id_ for id_, _ in wanted]
        assert [item.score for item in answer.items] == pytest.approx([score for _, score in wanted], abs=1e-5)
        request = Request(history=history, k=6, candidates=ids)
        assert [item.id for item in recommender.recommend(request).items] == [id_ for id_, _ in wanted]
        top = wanted[0][0]
        assert float(recommender.score(request, [top])[0]) == pytest.approx(wanted[0][1], abs=1e-5)
        assert recommender.explain(Request(history=history), top).score == pytest.approx(wanted[0][1], abs=1e-5)
    assert any(item.id in history for history, answer in zip(histories, plain, strict=True) for item in answer.items)
    left_out = recommender.recommend(Request(history=ids[:3], k=6, exclude=[ids[0]]))
    assert ids[0] not in [item.id for item in left_out.items]
    filtered = recommender.recommend(Request(history=ids[:3], k=6, filter_seen=True))
    assert not {item.id for item in filtered.items} & set(ids[:3])
    recommender.remove_items([ids[1]])
    assert ids[1] not in [item.id for item in recommender.recommend(Request(history=ids[:3], k=40)).items]


def test_predictions_are_the_artefact_s_answers(fitted: Path, folder: Path) -> None:
    run = fitted.parents[1]
    main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", str(fitted)])
    rows = pq.read_table(run / "predictions.parquet").to_pylist()
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["user_id"], []).append(row["item_id"])
    recommender = Recommender.load(folder)
    users = list(found)[:20]
    answers = recommender.recommend([Request(user=user, k=10) for user in users])
    for user, answer in zip(users, answers, strict=True):
        assert [item.id for item in answer.items] == found[user]


def test_what_cannot_learn_repeats_says_so() -> None:
    towers = (IdItemTower(8), PooledUserTower())
    with pytest.raises(ValueError, match=r"BPR cannot learn what a repeat adds"):
        TwoTower(*towers, BPR(), Dot(learn_repeats=True))
    with pytest.raises(ValueError, match=r"exclude_known to false"):
        TwoTower(*towers, Softmax(), Cosine(learn_repeats=True))
    with pytest.raises(ValueError, match=r"lightning_rec.TwoTower"):
        ImpressionTwoTower(*towers, score=Dot(learn_repeats=True))
