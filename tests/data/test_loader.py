import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from lightning_rec.data.batch import Batch, UserBatch
from lightning_rec.data.loader import LengthSampler, make_loader

SHAPES = [(1, 4, 1), (5, 4, 1), (5, 4, 3), (100, 8, 1), (100, 8, 2), (97, 8, 3), (24, 8, 3), (25, 8, 3), (9, 2, 8)]


def lengths_of(n, seed=0):
    return np.minimum(np.random.default_rng(seed).geometric(0.1, n), 50)


def samplers(n, batch_size, world_size, shuffle, **options):
    return [
        LengthSampler(lengths_of(n), batch_size, shuffle, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


class Numbers(Dataset):
    """A batch that says which samples and which seed it was asked for."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        rows = torch.as_tensor(index.samples)
        drawn = torch.from_numpy(np.random.default_rng(index.seed).integers(0, 1 << 30, len(rows)))
        return Batch(users=UserBatch(rows[:, None], torch.ones_like(rows), rows), index=drawn)


@pytest.mark.parametrize(("n", "batch_size", "world_size"), SHAPES)
def test_training_has_every_sample_once_in_equally_many_batches(n, batch_size, world_size):
    ranks = samplers(n, batch_size, world_size, shuffle=True, pool=2)
    for epoch in range(3):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        batches = [[index.samples for index in sampler] for sampler in ranks]
        assert {len(own) for own in batches} == {len(sampler) for sampler in ranks}
        assert len({len(own) for own in batches}) == 1
        everything = [batch for own in batches for batch in own]
        assert all(1 <= len(batch) <= batch_size for batch in everything)
        assert sorted(np.concatenate(everything).tolist()) == list(range(n))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n", [3, 4, 5, 10])
def test_training_with_one_sample_a_batch_has_no_empty_batch(n, world_size):
    ranks = samplers(n, 1, world_size, shuffle=True)
    batches = [[index.samples for index in sampler] for sampler in ranks]
    assert {len(own) for own in batches} == {n // world_size}
    assert {len(batch) for own in batches for batch in own} <= {1, 2}
    assert sorted(np.concatenate([batch for own in batches for batch in own]).tolist()) == list(range(n))


@pytest.mark.parametrize(("n", "batch_size", "world_size"), [*SHAPES, (3, 4, 3), (2, 4, 3), (0, 4, 2), (7, 1, 3)])
def test_evaluation_has_every_user_once(n, batch_size, world_size):
    ranks = samplers(n, batch_size, world_size, shuffle=False)
    batches = [[index.samples.tolist() for index in sampler] for sampler in ranks]
    assert [len(own) for own in batches] == [len(sampler) for sampler in ranks]
    assert all(1 <= len(batch) <= batch_size for own in batches for batch in own)
    assert sorted(sample for own in batches for batch in own for sample in batch) == list(range(n))
    # Lightning refuses a loader that is empty on one rank and not on another
    assert all(batches) == (n >= world_size)
    assert len([own for own in batches if own]) == min(n, world_size)


def test_evaluation_starts_with_the_longest():
    sampler = LengthSampler(np.array([1, 9, 5, 9, 2]), 2, shuffle=False)
    assert [index.samples.tolist() for index in sampler] == [[1, 3], [2, 4], [0]]


def test_order_follows_seed_and_epoch():
    def order(seed, epoch, world_size=1, rank=0):
        sampler = LengthSampler(lengths_of(60), 7, True, seed=seed, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        return [(index.samples.tolist(), index.seed) for index in sampler]

    assert order(3, 1) == order(3, 1)
    runs = [order(3, 0), order(3, 1), order(4, 0)]
    for number, one in enumerate(runs):
        for other in runs[:number]:
            assert [batch for batch, _ in one] != [batch for batch, _ in other]
    # what is drawn for a batch differs from batch to batch, rank to rank, epoch to epoch and seed to seed
    seeds = [seed for run in [*runs, order(3, 0, 2, 0), order(3, 0, 2, 1)[1:]] for _, seed in run]
    assert len(set(seeds)) >= len(seeds) - len(order(3, 0, 2, 0))
    assert not {seed for _, seed in order(3, 0, 2, 0)} & {seed for _, seed in order(3, 0, 2, 1)}


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_waste_less_padding_than_random_ones(world_size):
    lengths = lengths_of(2_000)

    def waste(batches):
        return sum(int((lengths[batch].max() - lengths[batch]).sum()) for batch in batches)

    sorted_batches = [index.samples for sampler in samplers(2_000, 32, world_size, True) for index in sampler]
    order = np.random.default_rng(0).permutation(2_000)
    random_batches = [order[start : start + 32] for start in range(0, 2_000, 32)]
    assert waste(sorted_batches) < 0.25 * waste(random_batches)
    evaluated = [index.samples for sampler in samplers(2_000, 32, world_size, False) for index in sampler]
    assert waste(evaluated) < 0.1 * waste(random_batches)


def test_batches_of_similar_length_come_in_no_order():
    means = [lengths_of(2_000)[index.samples].mean() for index in samplers(2_000, 32, 1, True, pool=100)[0]]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5


def test_ranks_have_equal_work_in_each_step():
    lengths = lengths_of(2_000)
    steps = zip(*samplers(2_000, 16, 2, True), strict=True)
    gaps = [abs(int(lengths[one.samples].max()) - int(lengths[other.samples].max())) for one, other in steps]
    assert np.mean(gaps) < 0.1 * lengths.max()


def test_too_few_samples_and_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="use fewer devices"):
        LengthSampler(np.ones(2, int), 4, True, world_size=3)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        LengthSampler(np.ones(2, int), 0, True)


def batches_of(loader):
    return [(batch.users.users.tolist(), batch.index.tolist()) for batch in loader]


def loader_of(num_workers=0, n=50):
    return make_loader(Numbers(n), LengthSampler(lengths_of(n), 8, True, seed=5), num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_loader_gives_exactly_what_is_left(num_workers):
    loader = loader_of(num_workers)
    loader.sampler.set_epoch(2)
    whole = batches_of(loader)
    assert len(whole) == len(loader) == 7
    assert loader.state_dict() == {"epoch": 2, "batches": 7}
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    assert state == {"epoch": 2, "batches": 3}
    del iterator

    resumed = loader_of(num_workers)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # a checkpoint before the first batch loses nothing
    resumed.sampler.set_epoch(2)
    iterator = iter(resumed)
    first = next(iterator)
    assert resumed.state_dict() == {"epoch": 2, "batches": 4}
    rest = [(first.users.users.tolist(), first.index.tolist()), *batches_of(iterator)]
    assert rest == whole[3:]
    assert resumed.state_dict() == {"epoch": 2, "batches": 7}
    # the next epoch is whole again, and equals that of a run that never stopped
    for each in (loader, resumed):
        each.sampler.set_epoch(3)
    assert batches_of(resumed) == batches_of(loader)


def test_an_iterator_that_is_never_used_does_not_consume_the_state():
    loader = loader_of()
    whole = batches_of(loader)
    loader.load_state_dict({"epoch": 0, "batches": 5})
    iter(loader)
    assert batches_of(loader) == whole[5:]


@pytest.mark.parametrize("state", [{"epoch": 0, "batches": 7}, {"epoch": 0, "batches": 0}, {"epoch": 4, "batches": 2}])
def test_a_finished_or_foreign_epoch_starts_afresh(state):
    loader = loader_of()
    loader.load_state_dict(state)
    assert len(batches_of(loader)) == 7


def test_the_state_before_the_first_batch_of_an_epoch_is_that_of_the_last_one():
    loader = loader_of()
    iterator = iter(loader)
    for _ in range(3):  # an epoch cut short, as by limit_train_batches
        next(iterator)
    loader.sampler.set_epoch(1)
    assert loader.state_dict() == {"epoch": 0, "batches": 3}


def test_making_batches_leaves_the_random_numbers_of_training_alone():
    loader = loader_of()
    before = torch.get_rng_state()
    batches_of(loader)
    assert torch.get_rng_state().equal(before)
