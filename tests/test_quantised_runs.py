"""A run whose language model is quantised, from fit to an answer."""

from pathlib import Path

import pytest
import torch

from lightning_rec.cli import main
from lightning_rec.recommend import Recommender, Request
from lightning_rec.towers.quantisation import four_bits_on_cpu

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "kind",
    ["8bit", pytest.param("4bit", marks=pytest.mark.skipif(not four_bits_on_cpu(), reason="needs AVX-512"))],
)
def test_from_fit_to_answers(kind, tiny_bert, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="needs the extra quantise")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text = (HERE / "configs" / "lora_batch.yaml").read_text()
    text = text.replace("SHOP", str(HERE / "data" / "files" / "shop")).replace("TINY_BERT", tiny_bert)
    (tmp_path / "config.yaml").write_text(text)
    options = ["--config", str(tmp_path / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / "run")]
    options += ["--model.item_tower.init_args.quantisation", kind]
    fitted = main(["fit", *options, "--trainer.max_epochs", "1"])
    last = next((tmp_path / "run").rglob("last.ckpt"))
    state = torch.load(last, weights_only=True)["state_dict"]
    assert not [name for name in state if "base_layer.weight" in name or "quant" in name or "SCB" in name]
    assert any("lora_A" in name for name in state), "what was trained is there"

    tested = main(["test", *options, "--ckpt_path", str(last)])
    for name in state:
        torch.testing.assert_close(tested.model.state_dict()[name], fitted.model.state_dict()[name])
    resumed = main(["fit", *options, "--ckpt_path", str(last), "--trainer.max_epochs", "2"])
    assert resumed.trainer.current_epoch == 2

    with pytest.raises(SystemExit):
        main(["export", str(last), str(tmp_path / "merged"), "--merge", "true"])
    assert not (tmp_path / "merged").exists()
    main(["export", str(last), str(tmp_path / "artefact")])
    answer = Recommender.load(tmp_path / "artefact").recommend([Request(text="red shoe", k=3)])[0]
    assert (answer.path, len(answer.items)) == ("text", 3)
