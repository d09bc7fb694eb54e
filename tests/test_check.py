"""`purified-opsd check` on real tiny models and files: what it shows, and what it says of runs that would stop."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from purified_opsd_trl import PurifiedOPSDTrainer, cli
from purified_opsd_trl.estimate import Machine, Model, Step
from purified_opsd_trl.head import LMHead
from purified_opsd_trl.memory import Kept, memory
from purified_opsd_trl.plan import Layout
from purified_opsd_trl.train import main, make_parser

from .conftest import read_rows


ROOT = Path(__file__).parent.parent


@pytest.fixture
def words(make_model_dir: Callable[..., Path], tmp_path: Path) -> list[str]:
    """Options of a run that works, with the teacher's thinking switched off and the student's on."""
    rows = [{"problem": row["prompt"], "solution": row["reference"]} for row in read_rows("standard")]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = {
        "model_name_or_path": make_model_dir(template="qwen3"),
        "dataset_name": tmp_path / "problems.jsonl",
        "dataset_prompt_column": "problem",
        "dataset_reference_column": "solution",
        "teacher_chat_template_kwargs": '{"enable_thinking": false}',
        "use_peft": "true",
        "lora_r": 4,
        "lora_target_modules": "all-linear",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 8,
        "max_steps": 3,
        "bf16": "false",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        "report_to": "none",
        "output_dir": tmp_path / "run",
    }
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def changed(words: list[str], **options: Any) -> list[str]:
    return [*words, *(word for key, value in options.items() for word in (f"--{key}", str(value)))]


def printed(capsys: pytest.CaptureFixture[str], words: list[str]) -> tuple[int, str]:
    status = cli.main(["check", *words])
    return status, capsys.readouterr().out


def part(output: str, name: str) -> str:
    (line,) = (line for line in output.splitlines() if line.startswith(f"{name} "))
    return line.removeprefix(name).strip()


@pytest.mark.parametrize("source", ["own", "other", "none"])
def test_it_shows_the_prompts_that_training_scores(
    words: list[str], source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*words, "--reference_source", source]
    status, output = printed(capsys, words)
    assert status == 0 and "FAILED" not in output
    assert not (tmp_path / "run").exists()
    blocks = output.split("of the first row, as the model sees them\n")[1].split("\nlengths ")[0]
    texts = [block.split(" -----\n", 1)[1] for block in ("\n" + blocks).split("\n----- ")[1:]]
    assert len(texts) == 3

    # The ids of a real step, decoded
    scored: dict[str, list[str]] = {}
    as_written = PurifiedOPSDTrainer._score

    def spy(trainer: Any, contexts: Any, batch: dict[str, Any]) -> Any:
        student = [ids[mask.bool()] for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
        ids = {"base": student} | {
            name: trainer.tokenize_teacher_prompts([getattr(c, name) for c in contexts])
            for name in ("teacher", "reference_only")
        }
        for name, prompts in ids.items():
            scored.setdefault(name, []).extend(map(trainer.processing_class.decode, prompts))
        return as_written(trainer, contexts, batch)

    monkeypatch.setattr(PurifiedOPSDTrainer, "_score", spy)
    main(
        *make_parser().parse(changed(words, max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=1))
    )
    for name, text in zip(("base", "teacher", "reference_only"), texts, strict=True):
        assert text in scored[name], name
    assert "<think>" not in texts[0] and texts[1].count("</think>") == 1


def test_it_counts_what_it_says(
    words: list[str], make_model_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    status, output = printed(capsys, words)
    folder = make_model_dir(template="qwen3")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trained, total = model.get_nb_trainable_parameters()
    assert f"{total - trained:,} weights, {trained:,} trained" in part(output, "model")
    assert part(output, "rows") == "8 of 8 can be used; a step uses 4"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        for row in read_rows("standard")
    ]
    longest = max(len(tokenizer(text)["input_ids"]) for text in questions)
    assert f"(longest {longest})" in part(output, "lengths")
    assert "3 steps" in part(output, "time") and "nothing sharded" in part(output, "devices")
    assert part(output, "self_check") == (
        "head, padding, frozen model and loss are those of this model. Gradients: in the first step"
    )


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({"model_name_or_path": "./nowhere"}, "model", "there is no folder ./nowhere"),
        ({"max_completion_length": 4096}, "model", "leaves no room for a prompt"),
        ({"dataset_name": "nowhere.jsonl"}, "data", "there is no file nowhere.jsonl"),
        ({"dataset_prompt_column": "question"}, "data", "no column `question`"),
        ({"gradient_accumulation_steps": 64}, "rows", "8 usable rows"),
        ({"max_reference_length": 3}, "rows", "reference"),
        ({"use_vllm": "true"}, "extras", "`use_vllm` needs `vllm`"),
        ({"output_dir": f"{__file__}/run"}, "output", f"`output_dir`: cannot write to {__file__}"),
    ],
)
def test_what_would_stop_a_run_is_one_line_and_a_status(
    words: list[str], options: dict[str, Any], name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "extras":
        import importlib.util

        if importlib.util.find_spec("vllm"):
            pytest.skip("vllm is installed")
    status, output = printed(capsys, changed(words, **options))
    assert status == 1
    failed = [line for line in output.splitlines() if "FAILED" in line]
    assert len(failed) == 1 and failed[0].startswith(f"{name} ") and message in failed[0]


def test_a_failing_self_check_is_one_of_the_parts(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = LMHead.from_model

    def scaled(model: Any, temperature: float = 1.0) -> LMHead:
        return replace(head(model, temperature), logit_scale=1.25)  # as if unnoticed in this architecture

    monkeypatch.setattr(LMHead, "from_model", staticmethod(scaled))
    status, output = printed(capsys, words)
    assert status == 1
    assert part(output, "self_check").startswith("FAILED: Self-check of the student (qwen3, torch.float32")
    assert "from the model's own logits" in part(output, "self_check")


def test_the_self_check_says_why_it_did_not_run(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert part(printed(capsys, changed(words, self_check="false"))[1], "self_check").startswith("left out")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    status, output = printed(capsys, words)
    assert status == 0 and "but 0.0 GB are free on this machine" in part(output, "self_check")


def test_a_folder_without_weights_is_found(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(words[words.index("--model_name_or_path") + 1])
    (tmp_path / "empty").mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "empty" / file.name).symlink_to(file)
    status, output = printed(capsys, changed(words, model_name_or_path=tmp_path / "empty"))
    assert status == 1 and "holds no weights" in part(output, "model")
    assert part(output, "rows") == "not checked: it needs model"


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("single", Layout(1, 0)),
        ("ddp", Layout(8, 0)),
        ("zero1", Layout(8, 1, True)),
        ("zero2", Layout(8, 2, True)),
        ("zero3", Layout(8, 3, True)),
        ("fsdp2", Layout(8, 3)),
    ],
)
def test_the_layout_is_that_of_the_accelerate_config(name: str, layout: Layout) -> None:
    file = str(ROOT / "recipes" / "accelerate_configs" / f"{name}.yaml")
    assert Layout.of_launcher(["--config_file", file]) == layout
    assert Layout.of_launcher(["--config_file", file, "--num_processes", "2"]).gpus == 2


# The table of recipes/README.md, GB for Qwen3-8B without the items below it
@pytest.mark.parametrize(
    ("kept", "gpus", "lora", "expected"),
    [
        ({}, 1, True, 19),
        ({"stage": 3, "deepspeed": True}, 8, True, 2.4),
        ({"weight_bytes": 4.0, "frozen_copy": True}, 1, False, 164),
        ({"stage": 1, "deepspeed": True}, 8, False, 45.0),  # 4P + 12P / N
        ({"stage": 2, "deepspeed": True, "frozen_copy": True}, 8, False, 47),
        ({"stage": 3, "deepspeed": True, "frozen_copy": True}, 8, False, 18),
        ({"stage": 3, "deepspeed": True, "frozen_copy": True}, 16, False, 9.2),
    ],
)
def test_memory_of_weights_and_optimizer_is_that_of_the_table(
    kept: dict[str, Any], gpus: int, lora: bool, expected: float
) -> None:
    model = Model(36, 4096, 32, 8, 128, 12288, 151936)
    trainable = model.adapter(64) if lora else model.weights
    parts = memory(model, Step(lora=lora), Machine(gpus=gpus), Kept(model.weights, trainable, **kept))
    held = sum(size for name, size in parts.items() if name not in ("gathered weights", "largest phase"))
    assert held / 1e9 == pytest.approx(expected, rel=0.04)


def test_an_adapter_has_the_weights_that_peft_makes(make_model_dir: Callable[..., Path]) -> None:
    config = AutoConfig.from_pretrained(make_model_dir())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert Model.of_config(config).adapter(3) == sum(p.numel() for p in model.parameters() if p.requires_grad)
