"""The training script and the command line."""

import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from trl import DatasetMixtureConfig

from purified_opsd_trl import InputError, cli
from purified_opsd_trl.loading import PurifiedOPSDScriptArguments, load_splits, map_columns, pick_split
from purified_opsd_trl.train import check_checkpoint, keep_wandb_offline, main, make_parser, run

from .conftest import free_port


ROOT = Path(__file__).parent.parent
ROWS = [{"problem": f"What is {i} + 1?", "solution": f"{i} + 1 = {i + 1}."} for i in range(8)]


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def keys(model_dir: Path, data_file: Path, tmp_path: Path) -> dict[str, Any]:
    """A flat recipe on the tiny model."""
    return {
        "model_name_or_path": str(model_dir),
        "dataset_name": str(data_file),
        "dataset_prompt_column": "problem",
        "dataset_reference_column": "solution",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_completion_length": 8,
        "learning_rate": "1e-3",  # without a dot YAML reads a string
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "output_dir": str(tmp_path / "out"),
    }


@pytest.fixture
def recipe(keys: dict[str, Any], tmp_path: Path) -> Callable[..., list[str]]:
    """Factory of command lines: writes the recipe, with some keys changed, and returns `--config <file>`."""

    def make(**changes: Any) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in {**keys, **changes}.items() if v is not None}))
        return ["--config", str(path)]

    return make


def parse(argv: list[str]) -> tuple[Any, ...]:
    return make_parser().parse_known(argv)[0]


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*/**/config_*.yaml")), ids=lambda p: p.parent.name)
def test_every_recipe_parses(path: Path) -> None:
    script_args, training_args, model_args, _ = parse(["--config", str(path)])
    assert script_args.dataset_name and model_args.model_name_or_path and training_args.output_dir


def test_the_command_line_overrides_the_recipe(recipe: Callable[..., list[str]]) -> None:
    _, training_args, _, _ = parse([*recipe(pmi_beta=2.0), "--pmi_beta", "0.5"])
    assert training_args.pmi_beta == 0.5
    assert training_args.learning_rate == 1e-3


def test_training_from_the_shell_and_resuming(recipe: Callable[..., list[str]], tmp_path: Path) -> None:
    # `purified-opsd train` -> accelerate launch -> the script, each in its own process, as a user runs it
    command = [sys.executable, "-m", "purified_opsd_trl.cli", "train"]
    first = subprocess.run(
        [*command, *recipe(save_steps=1, use_cpu=None), "--max_steps", "1", "--use_peft"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert first.returncode == 0, first.stderr
    assert "had defaults used instead" not in first.stderr and "gemm_4bit_forward" not in first.stderr
    if not torch.accelerator.is_available():
        assert first.stderr.count("There is no accelerator: training runs on the CPU (`use_cpu: true`).") == 1
    # DeepSpeed, where it is installed, says longer things
    assert max(len(line) for line in first.stdout.splitlines() if "real_accelerator.py" not in line) <= 160
    out = tmp_path / "out"
    assert (out / "adapter_model.safetensors").is_file()
    assert "2607.02234" in (out / "README.md").read_text()
    resumed = subprocess.run(
        [sys.executable, "-m", "purified_opsd_trl.train", *recipe(), "--use_peft", "--resume_from_checkpoint", "true"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert resumed.returncode == 0, resumed.stderr
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [1, 2]  # step 1 was not done again


def test_full_fine_tuning_writes_a_model(recipe: Callable[..., list[str]], tmp_path: Path) -> None:
    trainer = main(*parse(recipe(save_strategy="no")))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert trainer.state.global_step == 2
    assert trainer.train_dataset[0]["prompt"] == [{"role": "user", "content": "What is 0 + 1?"}]


def test_evaluation_uses_the_test_split_of_a_folder(
    recipe: Callable[..., list[str]], data_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(data_file, folder / "train.jsonl")
    shutil.copy(data_file, folder / "test.jsonl")
    trainer = main(*parse(recipe(dataset_name=str(folder), eval_strategy="steps", eval_steps=2, save_strategy="no")))
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


# Data ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_local_files(tmp_path: Path, suffix: str, streaming: bool) -> None:
    path = tmp_path / f"data.{suffix}"
    dataset = Dataset.from_list(ROWS)
    dataset.to_parquet(path) if suffix == "parquet" else dataset.to_json(path)
    script_args = PurifiedOPSDScriptArguments(
        dataset_name=str(path), dataset_prompt_column="problem", dataset_streaming=streaming
    )
    splits = load_splits(script_args, DatasetMixtureConfig())
    mapped = map_columns(pick_split(splits, "train", "dataset_train_split"), script_args)
    rows = list(mapped)
    assert len(rows) == len(ROWS)
    assert rows[3]["prompt"] == [{"role": "user", "content": ROWS[3]["problem"]}]
    assert rows[3]["solution"] == ROWS[3]["solution"]


def test_a_mixture(data_file: Path) -> None:
    mixture = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": str(data_file)}] * 2)
    splits = load_splits(PurifiedOPSDScriptArguments(), mixture)
    assert len(splits["train"]) == 2 * len(ROWS)


def test_a_system_prompt_comes_first() -> None:
    script_args = PurifiedOPSDScriptArguments(dataset_prompt_column="problem", system_prompt="Be brief.")
    row = map_columns(Dataset.from_list(ROWS), script_args)[0]
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]


def test_text_prompts_can_stay_text() -> None:
    script_args = PurifiedOPSDScriptArguments(dataset_prompt_column="problem", text_prompts=True)
    assert map_columns(Dataset.from_list(ROWS), script_args)[0]["prompt"] == ROWS[0]["problem"]


def test_messages_stay_as_they_are(conversational_dataset: Dataset) -> None:
    assert map_columns(conversational_dataset, PurifiedOPSDScriptArguments())[0] == conversational_dataset[0]


# Bad input -----------------------------------------------------------------------------------------------------------


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the script prints before it exits with status 2."""
    with pytest.raises(SystemExit) as stopped:
        run(argv)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pmi_betta": 1.0}, r"no option `pmi_betta`.* Did you mean `pmi_beta`\?"),
        ({"model": "m"}, "`model` is now called `model_name_or_path`"),
        ({"model_name_or_path": "./nowhere"}, "`model_name_or_path`: there is no folder ./nowhere"),
        (
            {"model_name_or_path": "no/where"},
            "`model_name_or_path`: no/where cannot be loaded: ",
        ),  # on the hub, which is not to be asked
        ({"output_dir": "/dev/null/run"}, "`output_dir`: /dev/null/run cannot be created: Not a directory"),
        ({"dataset_prompt_column": "question"}, "no column `question`; its columns are `problem`, `solution`"),
        ({"dataset_reference_column": "answer"}, "no column `answer`; its columns are .*`solution`"),
        ({"dataset_name": "nowhere.jsonl"}, r"no file nowhere\.jsonl"),
        ({"dataset_name": None}, "No dataset is named"),
        ({"model_name_or_path": None}, "No model is named"),
        (
            {"target": "pmi"},
            "`target` must be one of purified, teacher, contrastive, gated, interpolated, got 'pmi'\\.",
        ),
        ({"resume_from_checkpoint": "true"}, "holds no checkpoint"),
        ({"resume_from_checkpoint": "nowhere"}, "no folder nowhere"),
        ({"max_completion_length": 5000}, "leaves no room for a prompt"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_mistake_is_one_clear_message(
    recipe: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert re.search(message, refused(recipe(**changes), capsys))


def test_an_empty_reference_names_the_row(
    recipe: Callable[..., list[str]], data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS[:5], {**ROWS[5], "solution": ""}]
    lines = ["", *(json.dumps(row) for row in rows[:3]), " ", *(json.dumps(row) for row in rows[3:])]
    data_file.write_text("\n".join(lines))
    for streaming in (False, True):  # the sixth row, after two blank lines
        said = refused(recipe(dataset_streaming=streaming, max_steps=4), capsys)
        assert "train_dataset, row 5 (line 8), column `solution`: the reference is empty" in said


def test_a_mistake_exits_with_a_status_and_without_a_traceback(recipe: Callable[..., list[str]]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "purified_opsd_trl.cli", "train", *recipe(dataset_reference_column="answer")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: The dataset has no column `answer`")


def test_an_unknown_split_lists_those_there_are() -> None:
    with pytest.raises(InputError, match="no split `training`; it has `train`. Set `dataset_train_split`"):
        pick_split({"train": None}, "training", "dataset_train_split")  # type: ignore[dict-item]


def test_a_system_prompt_without_effect_is_refused(conversational_dataset: Dataset) -> None:
    with pytest.raises(InputError, match="`system_prompt` is for text prompts"):
        map_columns(conversational_dataset, PurifiedOPSDScriptArguments(system_prompt="x"))


@pytest.mark.parametrize(
    ("setting", "extra", "module"),
    [
        ("use_peft", "peft", "peft"),
        ("use_vllm", "vllm", "vllm"),
        ("load_in_4bit", "quantization", "bitsandbytes"),
    ],
)
def test_a_missing_extra_is_named(
    recipe: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    extra: str,
    module: str,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None if name == module else find(name, *args))
    said = refused([*recipe(), f"--{setting}"], capsys)
    assert re.search(rf'`{setting}`.* needs .*pip install "purified-opsd-trl\[{extra}\]"', said)


def test_resuming_is_off_by_default(recipe: Callable[..., list[str]]) -> None:
    assert check_checkpoint(parse(recipe())[1]) is None
    assert check_checkpoint(parse([*recipe(), "--resume_from_checkpoint", "false"])[1]) is None


def test_the_command_reports_mistakes_before_anything_is_launched(
    recipe: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *recipe(), "--pmi_betta", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: There is no option `pmi_betta`")


def test_a_word_that_belongs_to_no_option(recipe: Callable[..., list[str]]) -> None:
    with pytest.raises(InputError, match="`two` belongs to no option"):
        make_parser().parse_known([*recipe(), "--num_machines", "1", "two"])
    _, _, left = make_parser().parse_known([*recipe(), "--num_machines", "1"])
    assert left == ["--num_machines", "1"]


# wandb ---------------------------------------------------------------------------------------------------------------


class _Refuses(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(401)

    def log_message(self, *args: Any) -> None:
        pass


def test_a_server_of_wandb_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Refuses)
    threading.Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    keep_wandb_offline()
    assert "WANDB_MODE" not in os.environ
    server.server_close()


def test_training_goes_on_without_the_server_of_wandb(
    recipe: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = main(*parse(recipe(report_to="wandb", max_steps=1, save_strategy="no")))
    assert trainer.state.global_step == 1
    assert "cannot be reached" in caplog.text and "`wandb sync`" in caplog.text
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
