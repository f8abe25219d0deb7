"""A fitted run, opened again: its data, its model with the weights of a checkpoint, its config."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn

from lightning_rec import checkpoint as saved
from lightning_rec.data.batch import ItemBatch
from lightning_rec.data.datamodule import RecDataModule
from lightning_rec.data.impression_module import ImpressionDataModule
from lightning_rec.impression import ImpressionTwoTower
from lightning_rec.metrics import ImpressionRanking, RankingMetrics
from lightning_rec.module import TwoTower
from lightning_rec.recommend.manifest import ArtefactError
from lightning_rec.run_files import checkpoint_config, load_checkpoint
from lightning_rec.towers import CandidateAwareUserTower

#: Items that a tuned language model encodes between two steps of the progress bar.
_CHUNK = 1024


@dataclass
class Fitted:
    """A fitted run, of interactions or of impressions.

    Attributes:
        checkpoint: the file.
        config: the run's config.
        module: the model in evaluation mode, with the checkpoint's weights and the data attached to its towers.
        data: the data module, set up.
    """

    checkpoint: Path
    config: dict[str, Any]
    module: TwoTower | ImpressionTwoTower
    data: RecDataModule | ImpressionDataModule

    @property
    def n_test(self) -> int:
        """How many users, or labelled impressions, the test measures."""
        if isinstance(self.data, RecDataModule):
            return len(self.data.evaluation_dataset("test"))
        return int(self.data.impressions.labelled[self.data.numbers("test")].sum())

    def spec(self, name: str) -> dict[str, Any]:
        """``class_path`` and ``init_args`` of a part of the model, such as ``item_tower``, as the config has them.

        Args:
            name: ``item_tower``, ``user_tower``, ``score``, ``age`` or ``popularity``.

        Raises:
            ArtefactError: the config does not name the class.
        """
        spec = self.config["model"].get("init_args", {}).get(name)
        if name == "score" and spec is None:
            return {"class_path": "lightning_rec.towers.score.Dot", "init_args": {}}
        if not isinstance(spec, dict) or "class_path" not in spec:
            raise ArtefactError(
                f"The config of {self.checkpoint} names no class for model.init_args.{name}, so that it cannot "
                "be built again: export a checkpoint of `lightning-rec fit`."
            )
        return {"class_path": spec["class_path"], "init_args": dict(spec.get("init_args") or {})}

    def test_metrics(self) -> dict[str, float]:
        """What ``lightning-rec test`` measured of this very checkpoint; empty where it was not run."""
        path = self.checkpoint.resolve().parent.parent / "test_metrics.json"
        if not path.is_file():
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
        if Path(content.get("checkpoint") or "").name != self.checkpoint.resolve().name:
            return {}
        return {name: float(value) for name, value in content["metrics"].items()}

    @torch.no_grad()
    def encode_catalogue(self, bar: Any = None) -> Tensor:
        """``(n_rows, d)`` float32 vectors of the whole catalogue as the item tower returns them; row 0 is zero.

        Args:
            bar: a tqdm bar that is told of every item, or None.
        """
        module = self.module
        n = module.n_rows
        if any(True for _ in module.item_tower.language_parameters()):
            parts = []
            for start in range(1, n, _CHUNK):
                rows = torch.arange(start, min(start + _CHUNK, n))
                parts.append(module.item_tower(ItemBatch(torch.cat([rows.new_zeros(1), rows])))[1:])
                if bar is not None:
                    bar.update(len(rows))
            vectors = torch.cat([parts[0].new_zeros(1, parts[0].shape[1]), *parts]).float()
        else:
            vectors = module.encode_catalogue().float().clone()
            vectors[0] = 0
            if bar is not None:
                bar.update(n - 1)
        return vectors

    @torch.no_grad()
    def test_ndcg(self, raw: Tensor, bar: Any = None) -> float | None:
        """Test NDCG@10 with other item vectors, of impressions the mean over them; None where there is no one to test.

        Args:
            raw: ``(n_rows, d)`` item vectors in the place of those that the item tower returns.
            bar: a tqdm bar that is told of every user, or None.
        """
        module = self.module
        if not self.n_test:
            return None
        metric: RankingMetrics | ImpressionRanking = RankingMetrics(ks=(10,), names=("ndcg",))
        if isinstance(module, ImpressionTwoTower):
            metric = ImpressionRanking(ks=(10,))
        metric.configure(module.n_rows, module.train_counts)
        kept = module.test_metrics
        module.test_metrics = nn.ModuleList([metric])
        module._catalogue, module._table = raw, None
        try:
            for number, batch in enumerate(self.data.test_dataloader()):
                module.test_step(batch, number)
                if bar is not None:
                    bar.update(len(batch.users))
            found = float(cast(Any, metric.compute())["ndcg@10"])
            return found if math.isfinite(found) else None  # of no impression with a click and a non-click
        finally:
            module.test_metrics = kept
            (module.test_fallback if isinstance(module, ImpressionTwoTower) else module.test_ratings).reset()
            module.forget_catalogue()


def open_run(checkpoint: Path) -> Fitted:
    """Opens the run that wrote a checkpoint: reads its data, builds its model and loads the weights strictly.

    Args:
        checkpoint: a file that ``lightning-rec fit`` wrote. Its config is the run's ``config.yaml``, or, without that,
            what the checkpoint itself says.

    Raises:
        FileNotFoundError: there is no such file.
        ArtefactError: a run that is no two-tower run over interactions or impressions, or one without an interest
            vector for each user.
        RuntimeError: a checkpoint that does not fit its model or its data.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"There is no checkpoint {checkpoint}. Give a file that `lightning-rec fit` wrote.")
    config = checkpoint_config(checkpoint)
    for name in ("model", "data"):
        if not isinstance(config.get(name), dict) or "class_path" not in config[name]:
            raise ArtefactError(
                f"There is no config.yaml beside {checkpoint.resolve().parent} and the checkpoint does not name its "
                f"{name} class: export a checkpoint of `lightning-rec fit`, in its run folder."
            )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    built = parser.instantiate(parser.parse_object({name: config[name] for name in ("model", "data")}))
    module, data = built["model"], built["data"]
    _check(module, data)
    module.check_data(data)
    data.setup("test")
    module.build(data.view)
    loaded = load_checkpoint(checkpoint)
    saved.on_load(module, loaded, data.view)
    module.load_state_dict(loaded["state_dict"])
    for tower in (module.item_tower, module.user_tower):
        tower.prepare(data.view)
    return Fitted(checkpoint, config, module.eval(), data)


def _check(module: LightningModule, data: LightningDataModule) -> None:
    """Refuses runs from which an artefact could not answer.

    Raises:
        ArtefactError: saying why, and what can be exported.
    """
    of_impressions = isinstance(module, ImpressionTwoTower) and isinstance(data, ImpressionDataModule)
    if not of_impressions and not (isinstance(module, TwoTower) and isinstance(data, RecDataModule)):
        raise ArtefactError(
            f"{type(module).__name__} over {type(data).__name__} cannot be exported: an artefact answers from a "
            "lightning_rec.TwoTower over a data module of interactions, or from a lightning_rec.ImpressionTwoTower "
            "over one of impressions."
        )
    if not isinstance(module, ImpressionTwoTower):
        return
    own = type(module)
    if own.candidate_scores is not ImpressionTwoTower.candidate_scores:
        raise ArtefactError(
            f"{own.__name__} cannot be exported: it scores candidates in a way of its own, and an artefact answers by "
            "the dot product of two towers. Export a run of lightning_rec.ImpressionTwoTower."
        )
    aware = [part for part in module.user_tower.modules() if isinstance(part, CandidateAwareUserTower)]
    if aware:
        raise ArtefactError(
            f"{type(aware[0]).__name__} cannot be exported: its interest depends on the candidate, so that there is no "
            "interest vector by which a catalogue could be searched. Export a run whose model.user_tower has one for "
            "each user: NRMSUserTower, LSTURUserTower, SequenceUserTower, PooledUserTower, LanguageUserTower or one of "
            "your own."
        )
