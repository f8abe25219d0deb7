"""Two processes over gloo are one: gradients of gathered candidates, metrics, user counts and predictions."""

import json
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.fabric.utilities.distributed import _all_gather_ddp_if_available
from torch import nn

from lightning_rec import EcommerceDataModule, TwoTower
from lightning_rec.cli import main
from lightning_rec.data.collate import BatchIndex
from lightning_rec.data.readers import Files
from lightning_rec.gather import known_columns
from lightning_rec.objectives import BCE, BPR, RatingRegression, Softmax
from lightning_rec.towers import IdItemTower, PooledUserTower, SequenceUserTower

SHOP = Path(__file__).parent / "data" / "files" / "shop"

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="processes are forked, which a CUDA context forbids: set CUDA_VISIBLE_DEVICES="
)


@pytest.fixture(scope="module")
def data():
    module = EcommerceDataModule(
        Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv")), min_rating=0, max_history=6, candidates="batch"
    )
    module.setup()
    return module


def model(view, objective, user_tower=None, **options):
    torch.manual_seed(0)
    tower = user_tower if user_tower is not None else SequenceUserTower(blocks=1, heads=2, dropout=0.0)
    module = TwoTower(IdItemTower(8, init_std=1.0), tower, objective, **options)
    module.build(view)
    return module.double()


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def in_two_processes(function, *args):
    """Runs ``function(rank, *args)`` in both and returns what each gave back."""
    context = mp.get_context("fork")
    results = context.SimpleQueue()

    def work(rank, port):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        results.put((rank, function(rank, *args)))
        dist.barrier()
        dist.destroy_process_group()

    mp.start_processes(work, args=(free_port(),), nprocs=2, start_method="fork")
    found = dict(results.get() for _ in range(2))
    return found[0], found[1]


def attach(module, rank):
    """What the steps ask of a trainer, over a real process group."""
    module._trainer = SimpleNamespace(
        world_size=2,
        global_rank=rank,
        datamodule=None,
        strategy=SimpleNamespace(all_gather=_all_gather_ddp_if_available),
    )
    return module


def gradients(module, scale=1.0):
    return {name: (p.grad * scale).numpy() for name, p in module.named_parameters() if p.grad is not None}


def step_of_one_rank(rank, module, batches):
    loss = attach(module, rank).loss(batches[rank])
    loss.backward()
    # what DistributedDataParallel does
    total = {name: torch.from_numpy(grad) for name, grad in gradients(module, 0.5).items()}
    for grad in total.values():
        dist.all_reduce(grad)
    mean = loss.detach() / 2
    dist.all_reduce(mean)
    return float(mean), {name: grad.numpy() for name, grad in total.items()}


OBJECTIVES = {
    "softmax": lambda: Softmax(),
    "softmax with label smoothing": lambda: Softmax(label_smoothing=0.2),
    "bce": lambda: BCE(),
    "bpr": lambda: BPR(),
    "rating": lambda: RatingRegression(),
}


@pytest.mark.parametrize("candidates", ["batch", "catalogue"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_halves_give_the_gradient_of_the_whole_batch(data, objective, candidates):
    data.candidates = candidates
    dataset = data.train_dataset()
    users = np.arange(13)
    halves = [dataset[BatchIndex(users[part], (0,))] for part in (slice(0, 4), slice(4, 13))]
    whole = dataset[BatchIndex(users, (0,))]
    if candidates == "batch":
        rows = [set(half.items.rows[1 : half.n_candidates + 1].tolist()) for half in halves]
        assert rows[0] & rows[1], "the halves share candidates"
        assert rows[0] - rows[1]
        assert rows[1] - rows[0]
    module = model(data.view, OBJECTIVES[objective]())
    loss = module.loss(whole)
    loss.backward()
    expected = gradients(module)
    module.zero_grad()
    first, second = in_two_processes(step_of_one_rank, module, halves)
    assert first[0] == second[0] == pytest.approx(loss.item(), rel=1e-5)
    assert set(first[1]) == set(expected)
    for name, gradient in expected.items():
        # log-q is float32
        np.testing.assert_allclose(first[1][name], gradient, rtol=1e-5, atol=1e-7, err_msg=name)
        np.testing.assert_array_equal(first[1][name], second[1][name])


def test_without_gathering_each_half_has_its_own_candidates(data):
    data.candidates = "batch"
    dataset = data.train_dataset()
    halves = [dataset[BatchIndex(np.arange(*span), (0,))] for span in ((0, 4), (4, 13))]
    module = model(data.view, Softmax(), gather_negatives=False)
    steps = [int((half.targets > 0).sum()) for half in halves]
    losses = [module.loss(half).item() for half in halves]
    found, _ = in_two_processes(step_of_one_rank, module, halves)
    assert found[0] == pytest.approx(np.average(losses, weights=steps), rel=1e-5)


def test_log_q_of_the_union_is_that_of_the_whole_batch(data):
    data.candidates = "batch"
    dataset = data.train_dataset()
    spans = ((0, 3), (3, 13))
    halves = [dataset[BatchIndex(np.arange(*span), (0,))] for span in spans]
    whole = dataset[BatchIndex(np.arange(13), (0,))]
    seen = {}

    class Spy(nn.Module):
        needs_rating = False

        def forward(self, interest, candidates, target, **rest):
            seen.update(rest, target=target, n=len(candidates))
            return interest.sum() * 0 + candidates.sum() * 0

    def look(rank):
        module = attach(model(data.view, Softmax()), rank)
        module.objective = Spy()
        module.loss(halves[rank])
        return {name: value.numpy() if torch.is_tensor(value) else value for name, value in seen.items()}

    first, second = in_two_processes(look)
    for found in (first, second):
        assert found["n"] == whole.n_candidates
        np.testing.assert_allclose(found["log_q"], whole.log_q, rtol=1e-4)
    rows = whole.items.rows[1 : whole.n_candidates + 1]
    both = np.concatenate([first["target"], second["target"]])
    owner, step = (whole.targets > 0).nonzero(as_tuple=True)
    np.testing.assert_array_equal(rows.numpy()[both], rows[whole.targets[owner, step] - 1].numpy())
    columns = known_columns(whole.known, rows, data.view.n_rows, False).numpy()
    for found, users in ((first, slice(0, 3)), (second, slice(3, 13))):
        for mine, theirs in zip(found["known"], columns[users], strict=True):
            assert set(mine[mine >= 0]) == set(theirs[theirs >= 0])


def test_pooled_tower_under_two_processes(data):
    # one vector a history at every step, and a rank whose items are all of another rank too
    data.candidates = "batch"
    dataset = data.train_dataset()
    halves = [dataset[BatchIndex(np.array([5]), (0,))], dataset[BatchIndex(np.array([5, 6]), (0,))]]
    whole = dataset[BatchIndex(np.array([5, 5, 6]), (0,))]
    module = model(data.view, Softmax(), PooledUserTower("mean"))
    loss = module.loss(whole)
    loss.backward()
    expected = gradients(module)
    module.zero_grad()
    first, _ = in_two_processes(step_of_one_rank, module, halves)
    for name, gradient in expected.items():
        np.testing.assert_allclose(first[1][name], gradient, rtol=1e-5, atol=1e-7, err_msg=name)


# ---------------------------------------------------------------------- the commands

CONFIG = f"""
model:
  class_path: lightning_rec.TwoTower
  init_args:
    item_tower: {{class_path: lightning_rec.towers.IdItemTower, init_args: {{dim: 8}}}}
    user_tower: {{class_path: lightning_rec.towers.SequenceUserTower, init_args: {{blocks: 1, heads: 1, dropout: 0}}}}
data:
  class_path: lightning_rec.EcommerceDataModule
  init_args:
    reader:
      class_path: lightning_rec.data.readers.Files
      init_args: {{interactions: {SHOP}/interactions.csv, items: {SHOP}/items.csv}}
    min_rating: 0
    candidates: batch
    eval_batch_size: 3
trainer: {{accelerator: cpu, enable_progress_bar: false, enable_model_summary: false, max_epochs: 2}}
"""
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp_fork", "--trainer.num_nodes", "1"]


def test_commands_over_two_processes(tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    results = {}
    for name, devices, size in (("one", [], 10), ("two", TWO, 5)):
        place = ["--config", str(config), "--trainer.default_root_dir", str(tmp_path / name)]
        main(["fit", *place, "--data.batch_size", str(size), *devices])
        results[name] = next((tmp_path / name).rglob("last.ckpt"))
    # the same steps: two devices with five users each train on as many batches as one with ten
    one, two = (torch.load(path, weights_only=True) for path in (results["one"], results["two"]))
    assert one["global_step"] == two["global_step"]

    figures, tables = [], []
    for number, devices in enumerate(([], TWO)):
        monkeypatch.chdir(tmp_path)
        path = str(results["two"])
        main(["test", "--ckpt_path", path, *devices])
        figures.append(json.loads((results["two"].parent.parent / "test_metrics.json").read_text()))
        out = str(tmp_path / f"{number}.parquet")
        main(["predict", "--ckpt_path", path, "--predictions.path", out, *devices])
        tables.append(pq.read_table(out))
    assert figures[0]["metrics"].keys() == figures[1]["metrics"].keys()
    for name, value in figures[0]["metrics"].items():
        assert figures[1]["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert any("users" in name and value == 40 for name, value in figures[1]["metrics"].items())
    assert tables[0].drop_columns(["score"]).equals(tables[1].drop_columns(["score"])), "complete and in order"
    np.testing.assert_allclose(tables[0]["score"], tables[1]["score"], rtol=1e-5)
    assert list(dict.fromkeys(tables[1]["user_id"].to_pylist())) == [f"u{number:03d}" for number in range(1, 41)]
