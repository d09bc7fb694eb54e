"""The model card of a real run: what it names exists, and its code loads the model."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from purified_opsd_trl.env import versions
from purified_opsd_trl.train import main, make_parser

from .conftest import read_rows


@pytest.mark.parametrize("lora", [True, False])
def test_the_card_of_a_local_run_says_what_it_is_and_loads(
    lora: bool,
    make_model_dir: Callable[..., Path],
    arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, read_rows("standard"))), encoding="utf-8")
    folder = make_model_dir()
    options = {
        **arguments,
        "model_name_or_path": folder,
        "dtype": "float32",
        "dataset_name": "problems.jsonl",
        "max_steps": 1,
        "gradient_accumulation_steps": 1,
        "output_dir": "outputs/mine",
        **({"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"} if lora else {}),
    }
    trainer = main(*make_parser().parse([word for key, value in options.items() for word in (f"--{key}", str(value))]))
    text = Path("outputs/mine/README.md").read_text(encoding="utf-8")
    assert f"Base model: the local folder `{folder.name}`" in text and "None" not in text
    assert "Dataset: `problems.jsonl`" in text
    assert "Target: `purified` (`pmi_beta` 1, `pmi_clip` 10.0, center True), teacher `base`" in text
    assert f"purified_opsd_trl {versions()['purified_opsd_trl']}" in text
    assert ModelCard(text).data.to_dict()["model_name"] == "mine"
    assert str(tmp_path) not in text

    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(code, "model card", "exec"), namespace)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        loaded = AutoModelForCausalLM.from_pretrained("merged") if lora else namespace["model"]
        torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)
    (served,) = re.findall(r"```bash\n(vllm .*?)\n```", text)
    wanted = f"vllm serve {folder} --enable-lora --max-lora-rank 4 --lora-modules trained=outputs/mine"
    assert served == (wanted if lora else "vllm serve outputs/mine")
