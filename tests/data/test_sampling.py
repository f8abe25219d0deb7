import time

import numpy as np
import pytest

from lightning_rec.data.sampling import NegativeSampler, complement_uniform, complement_weighted, known_rows


def chi_square_ok(drawn, probabilities):
    """True when the draws fit: the statistic is within five standard deviations of its mean, none has probability 0."""
    counts = np.bincount(drawn, minlength=len(probabilities))
    support = probabilities > 0
    assert counts[~support].sum() == 0
    expected = len(drawn) * probabilities[support]
    assert expected.min() > 5, "too few draws for the test"
    statistic = ((counts[support] - expected) ** 2 / expected).sum()
    freedom = support.sum() - 1
    return statistic < freedom + 5 * np.sqrt(2 * freedom) + 1


def without(weights, known):
    left = np.array(weights, float)
    left[known] = 0
    return left / left.sum()


KNOWN = [[], [1], [12], [1, 12], [4, 5, 6], [1, 2, 3, 11, 12], [2, 4, 6, 8, 10, 12], list(range(2, 13))]


@pytest.mark.parametrize("known", KNOWN)
def test_uniform_draws_fit_brute_force(known):
    rng = np.random.default_rng(1)
    drawn = complement_uniform(rng, 13, np.array(known, int), 100_000)
    assert drawn.dtype == np.int64
    ones = np.ones(13)
    ones[0] = 0
    assert chi_square_ok(drawn, without(ones, known))


@pytest.mark.parametrize("known", KNOWN)
def test_weighted_draws_fit_brute_force(known):
    weights = np.array([0, 1, 2, 0, 4, 1, 1, 9, 0.5, 3, 1, 1, 2])
    rng = np.random.default_rng(2)
    drawn = complement_weighted(rng, np.cumsum(weights), weights, np.array(known, int), 100_000)
    assert drawn.dtype == np.int64
    assert chi_square_ok(drawn, without(weights, known))


def test_the_statistic_finds_a_wrong_distribution():
    rng = np.random.default_rng(3)
    drawn = complement_uniform(rng, 13, [1], 100_000)
    assert not chi_square_ok(drawn, without(np.array([0, 0, 1.1, *[1] * 10]), []))


def test_everything_known_gives_nothing():
    rng = np.random.default_rng(0)
    known = np.arange(1, 6)
    weights = np.array([0.0, 1, 1, 1, 1, 1])
    assert complement_uniform(rng, 6, known, 3).tolist() == []
    assert complement_weighted(rng, np.cumsum(weights), weights, known, 3).tolist() == []
    weights[5] = 0  # the one unknown row has no weight
    assert complement_weighted(rng, np.cumsum(weights), weights, known[:4], 3).tolist() == []
    assert complement_uniform(rng, 6, [], 0).tolist() == []
    assert complement_weighted(rng, np.cumsum(weights), weights, [], 0).tolist() == []


def test_known_rows_are_checked():
    rng = np.random.default_rng(0)
    for known in ([0, 1], [2, 1], [1, 1], [6]):
        with pytest.raises(ValueError, match="between 1 and 5"):
            complement_uniform(rng, 6, known, 1)
    assert known_rows([3, 0, 1, 3]).tolist() == [1, 3]
    assert known_rows([]).tolist() == []


def test_time_is_bounded_when_nearly_everything_is_known():
    rng = np.random.default_rng(0)
    n_rows = 1_000_001
    known = np.delete(np.arange(1, n_rows), [7, 500_000, 999_999])
    weights = np.full(n_rows, 1e6)
    weights[[8, 500_001, 1_000_000]] = 1e-3  # the unknown rows hold 3e-15 of the weight
    weights[0] = 0
    cumulative = np.cumsum(weights)
    start = time.perf_counter()
    uniform = complement_uniform(rng, n_rows, known, 1000)
    weighted = complement_weighted(rng, cumulative, weights, known, 1000)
    assert time.perf_counter() - start < 5  # drawing and rejecting would need 10 ** 17 draws
    assert set(uniform.tolist()) == {8, 500_001, 1_000_000}
    assert set(weighted.tolist()) <= {8, 500_001, 1_000_000}
    assert len(weighted) == 1000


def test_a_known_row_never_comes_out_whatever_the_weights():
    rng = np.random.default_rng(5)
    for _ in range(200):
        n_rows = int(rng.integers(2, 40))
        weights = 10.0 ** rng.uniform(-12, 12, n_rows) * (rng.random(n_rows) < 0.8)
        weights[0] = 0
        known = np.flatnonzero(rng.random(n_rows) < rng.random())
        known = known[known > 0]
        drawn = complement_weighted(rng, np.cumsum(weights), weights, known, 50)
        assert not np.isin(drawn, known).any()
        assert (weights[drawn] > 0).all()
        uniform = complement_uniform(rng, n_rows, known, 50)
        assert not np.isin(uniform, known).any()
        assert ((uniform >= 1) & (uniform < n_rows)).all()


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_a_batch_draws_for_each_user_as_for_one_alone(distribution):
    counts = np.array([99, 0, 16, 1, 81, 1, 1, 16])
    sampler = NegativeSampler(counts, distribution, power=0.5)
    known = [np.array(rows, int) for rows in ([], [2, 4], [1, 2, 3, 4, 5, 6, 7], [7], [1, 2, 3, 5, 6, 7])]
    drawn = sampler.sample_batch(np.random.default_rng(6), known, 100_000)
    assert drawn.shape == (5, 100_000)
    assert (drawn[2] == 0).all()
    assert (drawn[4] == 4).all()
    weights = np.array([0, 1, 4, 1, 9, 1, 1, 4]) if distribution == "popularity" else np.array([0, *[1] * 7])
    for user in (0, 1, 3):
        assert chi_square_ok(drawn[user], without(weights, known[user]))
        assert chi_square_ok(
            sampler.sample(np.random.default_rng(user), known[user], 100_000), without(weights, known[user])
        )
    assert sampler.sample_batch(np.random.default_rng(0), [], 3).shape == (0, 3)
    assert sampler.sample_batch(np.random.default_rng(0), known, 0).shape == (5, 0)


def test_the_same_seed_draws_the_same():
    sampler = NegativeSampler(np.arange(50), "popularity")
    draws = [sampler.sample(np.random.default_rng(9), [3, 4], 20).tolist() for _ in range(2)]
    assert draws[0] == draws[1]


def test_expected_numbers():
    sampler = NegativeSampler([5, 1, 16, 0], "popularity", power=0.5)
    assert sampler.probabilities.tolist() == pytest.approx([0, 1 / 6, 4 / 6, 1 / 6])
    assert np.exp(sampler.log_expected(12)).tolist() == pytest.approx([0, 2, 8, 2])
    assert sampler.inclusion(2).tolist() == pytest.approx([0, 11 / 36, 8 / 9, 11 / 36])
    assert np.exp(NegativeSampler([0, 0, 0]).log_expected(3)).tolist() == pytest.approx([0, 1.5, 1.5])
    assert NegativeSampler([0, 3]).inclusion(1).tolist() == [0, 1]


def test_inclusion_keeps_its_digits():
    counts = np.ones(10_000_001)
    assert NegativeSampler(counts).inclusion(3)[1] == pytest.approx(3e-7, rel=1e-6)


def test_popularity_power_zero_is_uniform_and_one_is_popularity():
    counts = [0, 1, 2, 5]
    assert NegativeSampler(counts, "popularity", power=0).probabilities.tolist() == pytest.approx(
        [0, 1 / 3, 1 / 3, 1 / 3]
    )
    assert NegativeSampler(counts, "popularity", power=1).probabilities.tolist() == pytest.approx(
        [0, 1 / 8, 2 / 8, 5 / 8]
    )


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_rows_never_touched_can_be_left_out(distribution):
    counts = np.array([7, 4, 0, 1, 9, 0])
    sampler = NegativeSampler(counts, distribution, power=0.5, trained_only=True)
    weights = np.array([0, 2, 0, 1, 3, 0]) if distribution == "popularity" else np.array([0, 1, 0, 1, 1, 0])
    assert sampler.probabilities.tolist() == pytest.approx((weights / weights.sum()).tolist())
    assert sampler.inclusion(1).tolist() == pytest.approx((weights / weights.sum()).tolist())
    known = [np.array(rows, int) for rows in ([], [4], [1, 3, 4], [1, 2, 3])]
    drawn = sampler.sample_batch(np.random.default_rng(1), known, 50_000)
    assert (drawn[2] == 0).all()  # nothing that is trained is left
    assert (drawn[3] == 4).all()
    assert sampler.sample(np.random.default_rng(1), known[2], 5).size == 0
    for user in (0, 1):
        assert chi_square_ok(drawn[user], without(weights, known[user]))
    with pytest.raises(ValueError, match="none has a training interaction"):
        NegativeSampler([3, 0, 0], trained_only=True)


def test_bad_samplers_are_named():
    with pytest.raises(ValueError, match="'uniform' or 'popularity'"):
        NegativeSampler([0, 1], "zipf")
    with pytest.raises(ValueError, match="no item"):
        NegativeSampler([0])
    for counts in ([0, -1], [0, np.nan]):
        with pytest.raises(ValueError, match="not negative"):
            NegativeSampler(counts)
