import torch

from lightning_rec.metrics import RankingMetric, RankingResult


class BestRank(RankingMetric):
    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, result):
        self.total += result.ranks.amax()

    def compute(self):
        return self.total


def test_a_metric_of_ones_own():
    metric = BestRank()
    metric.configure(10)
    assert metric.k == 0
    ranks = torch.tensor([[3, 1]])
    metric.update(RankingResult(ranks, ranks))
    assert metric(RankingResult(ranks, ranks)) == 3
    assert metric.compute() == 6


def test_number_of_items_comes_from_the_counts():
    ranks = torch.tensor([[1]])
    assert RankingResult(ranks, ranks).n_items is None
    assert RankingResult(ranks, ranks, counts=torch.zeros(7)).n_items == 6
    assert RankingResult(ranks, ranks, counts=torch.zeros(7), n_items=5).n_items == 5
