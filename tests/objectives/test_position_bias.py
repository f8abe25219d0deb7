"""Clicks simulated by the position-based model, under a ranker that shows the worst items first."""

import pytest
import torch

from lightning_rec.objectives import ClickBCE, Examination, ImpressionSoftmax

ITEMS, PLACES = 12, 6
THETA = 1 / torch.arange(1.0, PLACES + 1)


@pytest.fixture(scope="module")
def log():
    """Shown items ``(n, PLACES)``, clicks, and the true chance of a click on each item that is looked at."""
    g = torch.Generator().manual_seed(0)
    n = 60_000
    chance = torch.linspace(0.06, 0.25, ITEMS)[torch.randperm(ITEMS, generator=g)]
    # The old ranker nearly always shows the least relevant items first; one list in seven is shuffled.
    noise = torch.where(torch.rand(n, 1, generator=g) < 0.15, 5.0, 0.1)
    gumbel = -torch.log(-torch.log(torch.rand(n, ITEMS, generator=g)))
    shown = (noise * gumbel - chance.log()).topk(PLACES, dim=1).indices
    clicks = torch.rand(n, PLACES, generator=g) < THETA * chance[shown]
    return shown, clicks.float(), chance


def kendall(a, b):
    pairs = (a[:, None] - a).sign() * (b[:, None] - b).sign()
    return pairs.sum().item() / (len(a) * (len(a) - 1))


def train(objective, loss, steps, lr):
    score = torch.zeros(ITEMS, requires_grad=True)
    optimizer = torch.optim.Adam([score, *objective.parameters()], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(score, step).backward()
        optimizer.step()
        schedule.step()
    return score.detach()


def train_softmax(objective, log):
    shown, clicks, _ = log
    places = torch.arange(1, PLACES + 1).expand_as(shown)
    useful = clicks.any(1).nonzero()[:, 0]  # without a click there is nothing to learn for a softmax
    parts = useful.split(1024)

    def loss(score, step):
        rows = parts[step % (len(parts) - 1)]
        return objective(score[shown[rows]], clicks[rows], positions=places[rows])

    return train(objective, loss, 200, 0.1)


def train_clicks(objective, log):
    """All at once: one row of every item, place and label, weighted by how often it happened."""
    shown, clicks, _ = log
    cell = (shown * PLACES + torch.arange(PLACES)) * 2 + clicks.long()
    counts = torch.bincount(cell.flatten(), minlength=ITEMS * PLACES * 2).float()[None]
    at = torch.arange(ITEMS * PLACES * 2)
    item, place, label = at // 2 // PLACES, at // 2 % PLACES + 1, (at % 2).float()

    def loss(score, step):
        return objective(score[item][None], label[None], weights=counts, positions=place[None])

    return train(objective, loss, 600, 0.1)


def test_naive_models_learn_the_old_order(log):
    assert kendall(train_softmax(ImpressionSoftmax(), log), log[2]) < 0.65
    assert kendall(train_clicks(ClickBCE(), log), log[2]) < 0.65


def test_given_propensities_recover_the_order(log):
    score = train_softmax(ImpressionSoftmax(examination=Examination(propensities=THETA.tolist())), log)
    assert kendall(score, log[2]) > 0.93


@pytest.mark.parametrize("correction", ["model", "ipw"])
def test_given_propensities_recover_the_chances(log, correction):
    objective = ClickBCE(Examination(propensities=THETA.tolist()), correction=correction)
    score = train_clicks(objective, log)
    assert kendall(score, log[2]) > 0.93
    assert (objective.probability(score) - log[2]).abs().max() < 0.03


def test_position_based_model_recovers_places_and_chances(log):
    examination = Examination(positions=PLACES)
    objective = ClickBCE(examination)
    score = train_clicks(objective, log)
    assert kendall(score, log[2]) > 0.93
    assert (objective.probability(score) - log[2]).abs().max() < 0.03
    assert (examination(torch.arange(1, PLACES + 1)) - THETA).abs().max() < 0.06


def test_dual_learning_recovers_places_and_order(log):
    examination = Examination(positions=PLACES)
    score = train_softmax(ImpressionSoftmax(examination=examination), log)
    assert kendall(score, log[2]) > 0.93
    assert (examination(torch.arange(1, PLACES + 1)) - THETA).abs().max() < 0.08


def test_dual_learning_from_drawn_non_clicks(log):
    """A click and two of its non-clicks teach the same as the whole impression."""
    shown, clicks, chance = log
    places = torch.arange(1, PLACES + 1).expand_as(shown)
    kept = clicks.sum(1) == 1
    shown, clicks, places = shown[kept], clicks[kept], places[kept]
    g = torch.Generator().manual_seed(3)
    drawn = (clicks * 2 + torch.rand(clicks.shape, generator=g)).topk(3, dim=1).indices
    shown, clicks, places = (x.gather(1, drawn) for x in (shown, clicks, places))
    weights = torch.where(clicks == 1, 1.0, (PLACES - 1) / 2)
    examination = Examination(positions=PLACES)
    objective = ImpressionSoftmax(examination=examination)
    parts = torch.arange(len(shown)).split(1024)

    def loss(score, step):
        rows = parts[step % (len(parts) - 1)]
        return objective(score[shown[rows]], clicks[rows], positions=places[rows], weights=weights[rows])

    score = train(objective, loss, 200, 0.1)
    assert kendall(score, chance) > 0.87
    assert (examination(torch.arange(1, PLACES + 1)) - THETA).abs().max() < 0.1
