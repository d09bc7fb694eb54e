"""The training script and the command line."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from trl import DatasetMixtureConfig

from purified_opsd_trl import InputError, cli
from purified_opsd_trl.loading import PurifiedOPSDScriptArguments, load_splits, map_columns, pick_split
from purified_opsd_trl.train import check_checkpoint, check_unknown_keys, main, make_parser, run


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
    return make_parser().parse_args_and_config(argv)


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*/**/config_*.yaml")), ids=lambda p: p.parent.name)
def test_every_recipe_parses(path: Path) -> None:
    parser = make_parser()
    argv = ["--config", str(path), "--use_cpu", "True"]  # bf16 is refused where there is neither a GPU nor this
    *parsed, remaining = parser.parse_args_and_config(argv, return_remaining_strings=True)
    check_unknown_keys(parser, remaining)
    script_args, training_args, model_args, _ = parsed
    assert script_args.dataset_name and model_args.model_name_or_path and training_args.output_dir


def test_the_command_line_overrides_the_recipe(recipe: Callable[..., list[str]]) -> None:
    _, training_args, _, _ = parse([*recipe(pmi_beta=2.0), "--pmi_beta", "0.5"])
    assert training_args.pmi_beta == 0.5
    assert training_args.learning_rate == 1e-3


def test_training_from_the_shell_and_resuming(recipe: Callable[..., list[str]], tmp_path: Path) -> None:
    # `purified-opsd train` -> accelerate launch -> the script, each in its own process, as a user runs it
    command = [sys.executable, "-m", "purified_opsd_trl.cli", "train"]
    first = subprocess.run(
        [*command, *recipe(save_steps=1, num_processes=1, mixed_precision="no"), "--max_steps", "1", "--use_peft"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert first.returncode == 0, first.stderr
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pmi_betta": 1.0}, r"Unknown key `pmi_betta`.* Did you mean `pmi_beta`\?"),
        ({"dataset_prompt_column": "question"}, "no column `question`; its columns are `problem`, `solution`"),
        ({"dataset_reference_column": "answer"}, "no column `answer`; its columns are .*`solution`"),
        ({"dataset_name": "nowhere.jsonl"}, r"no file nowhere\.jsonl"),
        ({"dataset_name": None}, "No dataset is named"),
        ({"model_name_or_path": None}, "No model is named"),
        ({"target": "pmi"}, "`target` must be .purified. or .teacher."),
        ({"resume_from_checkpoint": "true"}, "holds no checkpoint"),
        ({"resume_from_checkpoint": "nowhere"}, "no folder nowhere"),
        ({"max_completion_length": 5000}, "leaves no room for a prompt"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_mistake_is_one_clear_message(
    recipe: Callable[..., list[str]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit, match=message) as exit_info:
        run(recipe(**changes))
    said = str(exit_info.value.code)
    assert said.startswith("error: ") and len(said.splitlines()) == 1


def test_an_empty_reference_names_the_row(recipe: Callable[..., list[str]], data_file: Path) -> None:
    rows = [*ROWS[:5], {**ROWS[5], "solution": ""}]
    data_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="train_dataset, row 5, column `solution`: the reference is empty"):
        run(recipe())


def test_a_mistake_exits_with_a_status_and_without_a_traceback(recipe: Callable[..., list[str]]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "purified_opsd_trl.cli", "train", *recipe(dataset_reference_column="answer")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
    )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: train_dataset has no column `answer`")


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
    recipe: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, setting: str, extra: str, module: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None if name == module else find(name, *args))
    with pytest.raises(SystemExit, match=rf'`{setting}`.* needs .*pip install "purified-opsd-trl\[{extra}\]"'):
        run([*recipe(), f"--{setting}"])


def test_resuming_is_off_by_default(recipe: Callable[..., list[str]]) -> None:
    assert check_checkpoint(parse(recipe())[1]) is None
    assert check_checkpoint(parse([*recipe(), "--resume_from_checkpoint", "false"])[1]) is None


def test_the_command_reports_mistakes_before_anything_is_launched(
    recipe: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *recipe(), "--pmi_betta", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: Unknown key `pmi_betta`")
