"""Which checkpoint is whole, and that the command line finds it."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from trl import DistillationTrainer

from purified_opsd_trl import InputError, PurifiedOPSDConfig
from purified_opsd_trl.checkpoints import is_complete, last_complete_checkpoint
from purified_opsd_trl.train import check_checkpoint

from .jobs import rows
from .worlds import ROOT, STARTUP, WATCHDOG


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("train", ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"]),
        ("_save_checkpoint", ["model", "trial"]),
        ("_save_rng_state", ["output_dir"]),
        ("_load_optimizer_and_scheduler", ["checkpoint"]),
        ("_get_output_dir", ["trial"]),
    ],
)
def test_what_is_overridden_is_as_it_was(method: str, parameters: list[str]) -> None:
    signature = inspect.signature(getattr(DistillationTrainer, method))
    assert [name for name in signature.parameters if name != "self"] == parameters


def write(output: Path, step: int, state: str | None) -> Path:
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if state is not None:
        (folder / "trainer_state.json").write_text(state)
    return folder


@pytest.mark.parametrize(
    "state", [None, "", '{"global_step": 1', "[]", "{}"], ids=["none", "empty", "half", "list", "no"]
)
def test_half_a_checkpoint_is_passed_over(tmp_path: Path, state: str | None) -> None:
    write(tmp_path, 9, '{"global_step": 9}')
    whole = write(tmp_path, 10, '{"global_step": 10}')
    broken = write(tmp_path, 100, state)
    write(tmp_path, 1000, None)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-2000").write_text("a file")
    assert is_complete(whole) and not is_complete(broken)
    assert last_complete_checkpoint(tmp_path) == (str(whole), ["checkpoint-1000", "checkpoint-100"])


def config(tmp_path: Path, value: str) -> PurifiedOPSDConfig:
    return PurifiedOPSDConfig(
        str(tmp_path / "run"), report_to="none", bf16=False, use_cpu=True, resume_from_checkpoint=value
    )


def test_the_newest_whole_one_is_found_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="run holds no checkpoint. Remove the key"):
        check_checkpoint(config(tmp_path, "true"))
    incomplete = write(tmp_path / "run", 4, None)
    with pytest.raises(InputError, match=r"no complete checkpoint \(incomplete or damaged: checkpoint-4\)"):
        check_checkpoint(config(tmp_path, "true"))
    with pytest.raises(InputError, match="checkpoint-4 is incomplete or damaged: trainer_state.json.*set `true`"):
        check_checkpoint(config(tmp_path, str(incomplete)))
    whole = write(tmp_path / "run", 2, '{"global_step": 2}')
    assert check_checkpoint(config(tmp_path, "true")) == str(whole)
    assert capsys.readouterr().out == (f"Resuming from {whole} (passing over incomplete or damaged: checkpoint-4)\n")
    assert check_checkpoint(config(tmp_path, str(whole))) == str(whole)
    assert check_checkpoint(config(tmp_path, "false")) is None


@pytest.mark.distributed
def test_two_processes_from_the_command_line_resume(model_dir: Path, tmp_path: Path) -> None:
    rows("even").to_json(tmp_path / "data.jsonl")
    recipe = {
        **{"model_name_or_path": str(model_dir), "dataset_name": str(tmp_path / "data.jsonl"), "dtype": "float32"},
        **{"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "teacher_model_kind": "ema"},
        **{"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False},
        **{"max_completion_length": 8, "per_device_train_batch_size": 2, "save_steps": 2},
        **{"output_dir": str(tmp_path / "run"), "logging_steps": 1, "dataloader_pin_memory": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config_file = str(ROOT / "recipes" / "accelerate_configs" / "cpu.yaml")
    command = [sys.executable, "-m", "purified_opsd_trl.cli", "train", "--config", str(tmp_path / "recipe.yaml")]
    command += ["--accelerate_config", config_file]

    # Resuming asks for states on the process's device, `cpu:<index>`, which torch does not know as a location
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\n"
        "torch.serialization.register_package(\n"
        "    5, lambda _: None, lambda obj, location: obj if location.startswith('cpu:') else None\n"
        ")\n"
    )

    def start(*further: str) -> str:
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *further],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=STARTUP + 2 * WATCHDOG,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    start("--max_steps", "2")
    (tmp_path / "run" / "checkpoint-4").mkdir()  # as if it had been killed in its next write
    output = start("--max_steps", "4", "--resume_from_checkpoint", "true")
    assert output.count(f"Resuming from {tmp_path / 'run' / 'checkpoint-2'} (passing over incomplete or damaged") == 1
    last = tmp_path / "run" / "checkpoint-4"
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] == 4
    assert (last / "rng_state_1.pth").is_file()  # there were two processes
