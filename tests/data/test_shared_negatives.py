"""Negatives that a whole step shares, drawn uniformly: the sampled softmax is the full one but for chance."""

import math

import numpy as np
import pytest
import torch

from lightning_rec.data.collate import BatchIndex, KnownItems, TrainDataset, training_samples
from lightning_rec.data.histories import build_histories
from lightning_rec.data.sampling import NegativeSampler
from lightning_rec.data.split import leave_one_out
from lightning_rec.objectives import Softmax

N, TOUCHED, NEGATIVES = 300, 200, 120  # the last 100 items are touched by nobody


def dataset(candidates="sampled"):
    rng = np.random.default_rng(0)
    histories = build_histories(
        np.repeat(np.arange(1, 61), 6),
        rng.integers(1, TOUCHED + 1, 360),
        user_ids=[f"u{n}" if n else "" for n in range(61)],
    )
    ends = leave_one_out(histories).train_end
    samples = training_samples(histories, ends, 10)
    sampler = NegativeSampler(np.ones(N + 1), "uniform") if candidates == "sampled" else None
    return TrainDataset(histories, samples, KnownItems.of(histories, ends), N + 1, candidates, sampler, NEGATIVES)


def steps(data, number, users=4):
    rng = np.random.default_rng(1)
    for step in range(number):
        yield data[BatchIndex(rng.choice(len(data), users, replace=False), (step,))]


def candidate_rows(batch):
    return batch.items.rows[1 : batch.n_candidates + 1]


def test_one_draw_for_the_whole_step():
    data = dataset()
    for batch in steps(data, 20):
        rows = candidate_rows(batch)
        targets = batch.items.rows[batch.targets[batch.targets > 0]]
        positives = set(targets.tolist())
        assert rows.tolist() == list(dict.fromkeys(rows.tolist())), "each candidate once"
        assert positives <= set(rows.tolist())
        assert 0 < len(set(rows.tolist()) - positives) <= NEGATIVES
        # what nobody touches is a candidate only by being drawn: NEGATIVES draws among what is no target of the step
        untouched = rows > TOUCHED
        chance = 1 - (1 - 1 / (N - len(positives))) ** NEGATIVES
        assert untouched.any()
        torch.testing.assert_close(
            batch.log_q[untouched], torch.full((int(untouched.sum()),), math.log(chance)), atol=1e-5, rtol=1e-5
        )
        assert (batch.log_q[~untouched] >= math.log(chance) - 1e-5).all(), "a target, or drawn"


def test_the_corrected_sum_over_candidates_is_that_over_the_catalogue():
    scores = torch.randn(N + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[1:TOUCHED] += 1  # targets come more often and score higher, so that no correction would show
    wanted = scores[1:].exp().sum().item()
    corrected, plain = [], []
    for batch in steps(dataset(), 800):
        rows = candidate_rows(batch)
        corrected.append((scores[rows] - batch.log_q).exp().sum().item())
        plain.append(scores[rows].exp().sum().item())
    error = np.std(corrected) / len(corrected) ** 0.5
    assert error < 0.01 * wanted
    assert np.mean(corrected) == pytest.approx(wanted, abs=4 * error + 0.005 * wanted)
    assert np.mean(plain) < 0.6 * wanted


def test_the_loss_and_its_gradient_are_near_those_of_the_full_softmax():
    random = torch.Generator().manual_seed(0)
    table = torch.randn(N + 1, 8, generator=random) * 0.5
    interest = torch.randn(4, 5, 8, generator=random)

    def loss(batch, objective):
        items = table.clone().requires_grad_()
        owner, step = (batch.targets > 0).nonzero(as_tuple=True)
        target = batch.targets[owner, step] - 1
        value = objective(interest[owner, step], items[candidate_rows(batch)], target, log_q=batch.log_q)
        # the target's own log q is taken off its logit too, a constant that no gradient sees
        constant = 0.0 if batch.log_q is None or not objective.correct_sampling else batch.log_q[target].mean().item()
        return value.item() - constant, torch.autograd.grad(value, items)[0]

    sampled, wanted, plain, gradients = [], [], [], []
    for one, full in zip(steps(dataset(), 150), steps(dataset("catalogue"), 150), strict=True):
        assert torch.equal(one.items.rows[one.targets], full.targets)
        assert full.items.whole
        found, gradient = loss(one, Softmax())
        exact, wanted_gradient = loss(full, Softmax())
        unlike, other_gradient = loss(one, Softmax(correct_sampling=False))
        sampled.append(found)
        wanted.append(exact)
        plain.append(unlike)
        gradients.append(torch.stack([gradient, wanted_gradient, other_gradient]).flatten(1))
    assert np.mean(sampled) == pytest.approx(np.mean(wanted), rel=0.005)
    assert np.mean(plain) < np.mean(wanted) - 0.4
    mean, exact, other = torch.stack(gradients).mean(0)
    assert (mean - exact).norm() < 0.1 * exact.norm()
    # what nobody touches is pushed away as hard as by the full softmax; without correction, targets push in its place
    mean, exact, other = (gradient.view(N + 1, 8)[TOUCHED + 1 :] for gradient in (mean, exact, other))
    assert (mean * exact).sum() / exact.square().sum() == pytest.approx(1, abs=0.04)
    assert (other * exact).sum() / exact.square().sum() < 0.92
