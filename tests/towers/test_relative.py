"""Biases of attention by brute force, and that no step learns of what comes after it."""

import math

import pytest
import torch
from torch.func import functional_call
from transformers.models.t5.modeling_t5 import T5Attention

from lightning_rec.data.batch import CatalogueView, UserBatch
from lightning_rec.towers import IdItemTower, SequenceUserTower
from lightning_rec.towers.relative import AttentionBias, DistanceBias, TimeGapBias, distance_buckets

CATALOGUE = CatalogueView(n_rows=20, n_users=4)
DAY = 86_400
NEWEST = 1_700_000_000


def random_bias(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def build(**options):
    torch.manual_seed(0)
    tower = SequenceUserTower(blocks=2, heads=2, max_length=10, **options)
    items = IdItemTower(8)
    items.configure(CATALOGUE)
    tower.configure(CATALOGUE, items)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return tower.eval()


def batch(histories, times=None, width=None):
    width = width or max(len(history) for history in histories)

    def padded(rows):
        return torch.tensor([list(row) + [0] * (width - len(row)) for row in rows])

    lengths = torch.tensor([len(history) for history in histories])
    users = torch.zeros(len(histories), dtype=torch.int64)
    return UserBatch(padded(histories), lengths, users, None if times is None else padded(times))


@pytest.fixture
def items():
    return torch.randn(20, 8, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------- distances


def test_one_number_a_distance_by_brute_force():
    bias = random_bias(DistanceBias(heads=3, max_length=7))
    found = bias(5)
    assert found.shape == (3, 5, 5)
    for h in range(3):
        for i in range(5):
            for j in range(i + 1):
                assert found[h, i, j] == bias.table[i - j, h]


@pytest.mark.parametrize(("buckets", "longest"), [(8, 50), (32, 128), (4, 10), (16, 200)])
def test_buckets_are_those_of_t5(buckets, longest):
    distances = torch.arange(longest)
    wanted = T5Attention._relative_position_bucket(
        -distances, bidirectional=False, num_buckets=buckets, max_distance=longest
    )
    found = distance_buckets(distances, buckets, longest)
    # T5 rounds a logarithm in float32, where an exact one may lie on the other side of a whole number
    assert (found - wanted).abs().max() <= 1
    assert (found == wanted).float().mean() >= 0.98
    assert found.diff().ge(0).all()
    assert found[: buckets // 2].tolist() == list(range(buckets // 2))
    assert found.max() == buckets - 1
    bias = random_bias(DistanceBias(2, longest, buckets))
    assert bias.table.shape == (buckets, 2)
    torch.testing.assert_close(bias(longest)[1, -1], bias.table[found.flip(0), 1])


def test_more_buckets_than_distances():
    assert distance_buckets(torch.arange(5), 32, 5).tolist() == [0, 1, 2, 3, 4]
    assert DistanceBias(1, 1, 2)(1).tolist() == [[[0.0]]]
    with pytest.raises(ValueError, match="relative_buckets is 1"):
        DistanceBias(1, 5, 1)


# ---------------------------------------------------------------------- time gaps


def test_time_gaps_by_brute_force():
    bias = random_bias(TimeGapBias(heads=2, buckets=40))
    random = torch.Generator().manual_seed(0)
    gaps = (10 ** (torch.rand(4, 6, generator=random) * 7)).long()
    times = NEWEST + gaps.cumsum(1)
    times[2] = times[2, 0]  # all at once
    found = bias(times)
    assert found.shape == (4, 2, 6, 6)
    for u in range(4):
        for h in range(2):
            for i in range(6):
                for j in range(i + 1):
                    gap = int(times[u, i] - times[u, j])
                    bucket = min(int(math.log(max(gap, 1)) / 0.301), 39)
                    assert found[u, h, i, j] == bias.table[bucket, h]


def test_the_gradient_of_time_gaps_is_that_of_plain_indexing():
    bias = random_bias(TimeGapBias(heads=2, buckets=12)).double()
    times = NEWEST + torch.randint(0, 100, (3, 5), generator=torch.Generator().manual_seed(0)).cumsum(1)
    times[1, 2] = 0
    weights = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    (found,) = torch.autograd.grad((bias(times) * weights).sum(), bias.table)
    padded = torch.cat([bias.table, bias.table.new_zeros(1, 2)])
    (wanted,) = torch.autograd.grad((padded[bias.buckets(times)].permute(0, 3, 1, 2) * weights).sum(), bias.table)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(bias(times), padded[bias.buckets(times)].permute(0, 3, 1, 2))
    assert torch.autograd.gradcheck(lambda table: functional_call(bias, {"table": table}, (times,)), bias.table)


def test_buckets_by_hand():
    bias = TimeGapBias(1, 64)
    gaps = [0, 1, 2, 3, 60, 3_600, DAY, 365 * DAY, 10**12]
    found = bias.buckets(torch.tensor([[NEWEST, NEWEST + gap] for gap in gaps]))[:, 1, 0]
    assert found.tolist() == [0, 0, 2, 3, 13, 27, 37, 57, 63]


def test_unknown_times_add_nothing():
    bias = random_bias(TimeGapBias(2, 8))
    found = bias(torch.tensor([[0, 0, NEWEST, NEWEST + 5]]))
    assert not found[..., :2].any()
    assert not found[..., :2, :].any()
    assert found[..., 2:, 2:].all()
    tower, plain = build(time_bias=True, positions="relative"), build(positions="relative")
    plain.load_state_dict({k: v for k, v in tower.state_dict().items() if "attention_bias.time" not in k})
    vectors = torch.randn(20, 8)
    torch.testing.assert_close(
        tower(batch([[1, 2, 3]], [[0, 0, 0]]), vectors), plain(batch([[1, 2, 3]]), vectors), atol=1e-5, rtol=1e-5
    )


def test_data_without_times_is_refused(items):
    with pytest.raises(ValueError, match=r"time_bias needs the times of events.*time_bias to false"):
        build(time_bias=True)(batch([[1, 2]]), items)
    for buckets in (0, 129):
        with pytest.raises(ValueError, match=f"time_buckets is {buckets}"):
            TimeGapBias(1, buckets)


# ---------------------------------------------------------------------- both, in the tower


def test_the_sum_and_its_mask():
    bias = random_bias(AttentionBias(2, 10, relative=True, time=True, time_buckets=16))
    users = batch([[1, 2, 3], [4]], [[NEWEST, NEWEST + 50, NEWEST + DAY], [NEWEST]])
    found = bias(users)
    assert found.shape == (2, 2, 3, 3)
    later = torch.ones(3, 3).triu(1).bool()
    assert (found[:, :, later] == float("-inf")).all()
    wanted = bias.distance(3)[None] + bias.time(users.times)
    torch.testing.assert_close(found[..., ~later], wanted[..., ~later])
    assert random_bias(AttentionBias(2, 10))(users).shape == (1, 2, 3, 3)


KINDS = {
    "relative": {"positions": "relative"},
    "both": {"positions": "both", "relative_buckets": 4, "positions_from": "start"},
    "time": {"positions": "none", "time_bias": True},
    "ligr": {"block": "ligr"},
    "ligr all": {"block": "ligr", "positions": "both", "time_bias": True},
    "post": {"norm": "post", "positions": "relative", "time_bias": True, "activation": "relu"},
}
TIMES = [NEWEST, NEWEST + 30, NEWEST + DAY, NEWEST + 9 * DAY, NEWEST + 9 * DAY]


@pytest.mark.parametrize("kind", list(KINDS))
def test_later_events_and_times_change_no_earlier_interest(kind, items):
    tower = build(**KINDS[kind])
    history = [1, 2, 3, 4, 5]
    one = tower(batch([history], [TIMES]), items)
    for step in range(1, 5):
        other_items = history[:step] + [9, 11, 2, 7, 8][step:]
        other_times = TIMES[:step] + [time + 400 * DAY for time in TIMES[step:]]
        other = tower(batch([other_items], [other_times]), items)
        torch.testing.assert_close(other[:, :step], one[:, :step])
        assert not torch.allclose(other[:, step:], one[:, step:])
        moved = tower(batch([history], [other_times]), items)
        torch.testing.assert_close(moved[:, :step], one[:, :step])
        if tower.time_bias:
            assert not torch.allclose(moved[:, step:], one[:, step:])
    if tower.time_bias:  # only gaps count, not the date
        shifted = tower(batch([history], [[time + 1000 * DAY for time in TIMES]]), items)
        torch.testing.assert_close(shifted, one)


@pytest.mark.parametrize("kind", list(KINDS))
def test_padding_never_matters(kind, items):
    tower = build(**KINDS[kind])
    short, long = [3, 1], [4, 5, 6, 7, 8]
    alone = tower(batch([short], [TIMES[:2]]), items)
    wide = tower(batch([short, long], [TIMES[:2], TIMES], width=9), items)
    torch.testing.assert_close(wide[:1, :2], alone)
    torch.testing.assert_close(wide[1:, :5], tower(batch([long], [TIMES]), items))
    poisoned = batch([short], [TIMES[:2]], width=9)
    poisoned.times[:, 2:] = 1
    poisoned.history[:, 2:] = 5
    torch.testing.assert_close(tower(poisoned, items)[:, :2], alone)
    none = tower(batch([[], [1]], [[], [NEWEST]]), items)
    assert not none[0].any()
    assert none.isfinite().all()


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_parameter_learns(kind, items):
    tower = build(**KINDS[kind]).train()
    tower(batch([[1, 2, 3], [4, 5, 6]], [TIMES[:3], TIMES[1:4]]), items).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in tower.parameters())
    if tower.attention_bias is not None:
        assert all(bool(table.grad.any()) for table in tower.attention_bias.parameters())


def test_an_untrained_bias_is_none(items):
    torch.manual_seed(0)
    towers = []
    for options in ({"positions": "none"}, {"positions": "relative", "time_bias": True}):
        torch.manual_seed(0)
        tower = SequenceUserTower(heads=2, max_length=10, **options)
        width = IdItemTower(8)
        tower.configure(CATALOGUE, width)
        towers.append(tower.eval())
    users = batch([[1, 2, 3]], [TIMES[:3]])
    torch.testing.assert_close(towers[0](users, items), towers[1](users, items))
    assert set(towers[1].state_dict()) - set(towers[0].state_dict()) == {
        "attention_bias.distance.table",
        "attention_bias.time.table",
    }


def test_positions_that_are_asked_for(items):
    names = {
        kind: {name for name in build(positions=kind).state_dict() if "positions" in name or "bias.d" in name}
        for kind in ("absolute", "relative", "both", "none")
    }
    absolute, relative = {"positions.weight"}, {"attention_bias.distance.table"}
    assert names == {"absolute": absolute, "relative": relative, "both": absolute | relative, "none": set()}
    assert build().attention_bias is None, "the default has no bias and keeps the fast path"
    with pytest.raises(ValueError, match=r"positions is both, but positions_from is none"):
        build(positions="both", positions_from="none")
    with pytest.raises(ValueError, match=r"LiGR block normalises before each part, but norm is post"):
        build(block="ligr", norm="post")
    assert build(block="ligr").blocks[0].expand.out_features == 32
    assert build(block="ligr", feed_forward=6).blocks[0].multiply.out_features == 6
