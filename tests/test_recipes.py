"""The paper's recipes: their headers, their settings, one training step each, the data builder and `reproduce.sh`."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from datasets import Dataset
from transformers import AutoProcessor
from trl.chat_template_utils import deepseek_r1_distill_chat_template, qwen3_chat_template

from purified_opsd_trl import build_contexts
from purified_opsd_trl.collator import shared_prefixes
from purified_opsd_trl.config import REFERENCE_FIRST_TEACHER_PROMPT_TEMPLATE
from purified_opsd_trl.errors import InputError
from purified_opsd_trl.evaluate.arguments import parse as parse_evaluate
from purified_opsd_trl.evaluate.paper import paper_rows
from purified_opsd_trl.rollout.adapters import start_command
from purified_opsd_trl.train import launch_arguments, main, make_parser
from recipes import build_data
from tests.conftest import build_tokenizer
from tests.lora_server import LoraServer
from tests.vision import build_processor, build_vlm, image_rows


ROOT = Path(__file__).parent.parent
LONG = sorted(ROOT.glob("recipes/*/purified_opsd/config_*_16k.yaml"))  # beyond the paper's 1,024 tokens
RECIPES = sorted(path for data in ("dasd", "mathcot") for path in ROOT.glob(f"recipes/*/*/config_{data}.yaml"))
BENCHMARKS = ["aime24", "aime25", "hmmt25"]
TITLES = {"dasd": "DASD-10K", "mathcot": "Math-CoT-20K"}

# folder -> hub id, parameters, GPU, architecture of the weights, chat template
QWEN3 = ("qwen3", {"num_key_value_heads": 1}, "qwen3")
OLMO3 = {"num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
MODELS: dict[str, tuple[str, float, str, tuple[str, dict[str, Any], str]]] = {
    "Qwen3-8B": ("Qwen/Qwen3-8B", 8.19e9, "H100", QWEN3),
    "Qwen3-4B": ("Qwen/Qwen3-4B", 4.02e9, "H100", QWEN3),
    "Qwen3-1.7B": ("Qwen/Qwen3-1.7B", 1.72e9, "RTX 4090", QWEN3),
    "Qwen3-0.6B": ("Qwen/Qwen3-0.6B", 0.60e9, "RTX 4090", QWEN3),
    "DeepSeek-R1-Distill-Qwen-7B": (
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        7.62e9,
        "H100",
        ("qwen2", {"num_key_value_heads": 1}, "deepseek_r1_distill"),
    ),
    "Olmo-3-7B-Think": ("allenai/Olmo-3-7B-Think", 7.30e9, "H100", ("olmo3", OLMO3, "olmo3_think")),
}
# layers, hidden, intermediate, width of keys, width of attention, vocabulary, matrices of embedding and head
SHAPES = {
    "Qwen3-8B": (36, 4096, 12288, 1024, 4096, 151936, 2),
    "Qwen3-4B": (36, 2560, 9728, 1024, 4096, 151936, 1),
    "Qwen3-1.7B": (28, 2048, 6144, 1024, 2048, 151936, 1),
    "Qwen3-0.6B": (28, 1024, 3072, 1024, 2048, 151936, 1),
    "DeepSeek-R1-Distill-Qwen-7B": (28, 3584, 18944, 512, 3584, 152064, 2),
    "Olmo-3-7B-Think": (32, 4096, 11008, 4096, 4096, 100278, 2),
}
GPUS = {"H100": (80, 989e12, 3.35e12), "RTX 4090": (24, 165e12, 1.01e12)}  # GB, bf16 FLOP/s, bytes/s


def names(path: Path) -> tuple[str, str]:
    """Folder of the model and name of the data, from a recipe's path."""
    return path.parts[-3], path.stem.removeprefix("config_")


def parse(argv: list[str]) -> tuple[Any, ...]:
    """As the command parses it, but without a GPU: what the script does not take must be the launcher's."""
    parsed, _, _ = make_parser().parse_known([*argv, "--use_cpu", "True"])
    return parsed


AHEAD = "Rollouts ahead, with a server on a second GPU (docs/async.md)"
recipe = pytest.mark.parametrize("path", RECIPES, ids=["-".join(names(path)) for path in RECIPES])


def test_every_model_has_a_recipe_for_both_datasets() -> None:
    assert {names(path) for path in RECIPES} == {(model, data) for model in MODELS for data in TITLES}


@pytest.mark.parametrize(
    ("arguments", "processes", "machines"),
    [
        ("", 1, 1),
        ("--accelerate_config {}/zero3.yaml", 8, 1),
        ("--accelerate_config {}/zero3_2nodes.yaml --machine_rank 1 --main_process_ip 10.0.0.1", 16, 2),
        ("--config_file {}/fsdp2.yaml --num_processes 4", 4, 1),
        ("--accelerate_config multi_gpu", 8, 1),  # one of TRL's own
    ],
)
def test_the_accelerate_file_takes_precedence_over_the_recipe(arguments: str, processes: int, machines: int) -> None:
    config = ROOT / "recipes" / "Qwen3-8B" / "purified_opsd" / "config_dasd.yaml"
    *_, from_recipe, from_command_line = make_parser().parse_args_and_config(
        [
            "--config",
            str(config),
            *shlex.split(arguments.format(ROOT / "recipes" / "accelerate_configs")),
            "--use_cpu",
            "True",
        ],
        return_remaining_strings=True,
        separate_remaining_strings=True,
    )
    assert "--num_processes" in from_recipe
    launch, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(
            [*launch_arguments(from_recipe, from_command_line), "-m", "purified_opsd_trl.train"]
        )
    )
    assert (launch.num_processes, launch.num_machines) == (processes, machines)
    assert launch.use_deepspeed == ("zero3" in arguments) and launch.use_fsdp == ("fsdp2" in arguments)
    assert launch.mixed_precision == "bf16"


def test_an_unknown_accelerate_config_is_refused() -> None:
    with pytest.raises(InputError, match="zero9 is neither a file nor"):
        launch_arguments([], ["--accelerate_config", "zero9"])


@recipe
def test_settings_are_the_papers(path: Path) -> None:
    model, data = names(path)
    script, training, weights, _ = parse(["--config", str(path)])
    assert weights.model_name_or_path == MODELS[model][0]
    assert (weights.use_peft, weights.lora_r, weights.dtype) == (True, 64, "bfloat16")
    assert (training.learning_rate, training.max_steps, training.save_steps) == (5e-6, 200, 50)
    assert (training.max_completion_length, training.gradient_checkpointing, training.use_vllm) == (1024, True, True)
    assert (training.pmi_beta, training.pmi_clip, training.pmi_center, training.beta) == (1.0, 10.0, True, 0.5)
    assert (training.target, training.teacher_model_kind, training.loss_type) == ("purified", "base", "divergence")
    processes = yaml.safe_load(path.read_text())["num_processes"]
    assert processes * training.per_device_train_batch_size * training.gradient_accumulation_steps == 32
    assert (
        script.dataset_name
        == {
            "dasd": "outputs/data/dasd_10k.jsonl",
            "mathcot": "outputs/data/math_cot_20k.jsonl",
        }[data]
    )
    # Qwen3 has a switch, the two others always think
    assert training.chat_template_kwargs == ({"enable_thinking": True} if model.startswith("Qwen3") else None)
    assert training.output_dir == f"outputs/{model}-purified-{data}"


def expected_hours(parameters: float, flops: float, bandwidth: float) -> float:
    """The formula of recipes/README.md, in its words: 200 steps, each generation, scoring and training."""
    completion, question, reference, rows = 1024, 256, 4096, 32
    generation = completion * 2 * parameters / (0.6 * bandwidth)  # every token reads the weights once
    contexts = [question, question + reference, reference]
    scored = sum(rows * (context + completion) for context in contexts)
    trained = rows * (question + completion)
    compute = (2 * parameters * scored + 6 * parameters * trained) / (0.4 * flops)
    return 200 * (generation + compute) / 3600


def expected_memory(path: Path) -> float:
    """GB by the formulas of recipes/README.md: LoRA on one GPU, and the larger of scoring and student with loss."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    layers, hidden, intermediate, kv, attention, vocab, heads = SHAPES[names(path)[0]]
    linear = [(hidden, attention), (hidden, kv), (hidden, kv), (attention, hidden)] + 3 * [(hidden, intermediate)]
    weights = layers * sum(i * o for i, o in linear) + heads * hidden * vocab
    adapter = layers * sum(settings["lora_r"] * (i + o) for i, o in linear)
    scores = 2 * 2 * 32 * 1024 * hidden  # two states in bf16 per token
    longest = 4 * (256 + 4096 + 1024)
    scored = min(longest, settings["scoring_token_budget"]) * 2 * (2 * intermediate + 4 * hidden)
    student = 1.5 * 2 * layers * 4 * (256 + 1024) * hidden + 512 * 2**20
    return (2 * weights + 16 * adapter + scores + max(scored, student)) / 1e9


@recipe
def test_the_header_holds(path: Path) -> None:
    model, data = names(path)
    hub_id, parameters, gpu, _ = MODELS[model]
    header = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    fields = dict(line.removeprefix("# ").split(": ", 1) for line in header if ": " in line)
    memory, flops, bandwidth = GPUS[gpu]
    assert header[0].startswith(f"# Hardware: 1 x {memory} GB GPU")
    assert fields["Global batch"].startswith("32 = 4 per device x 8 accumulation steps x 1 process")
    command = ["purified-opsd", "train", "--config", str(path.relative_to(ROOT))]
    assert fields["Command"] == " ".join(command)
    hours = f"{expected_hours(parameters, flops, bandwidth):.1f} on one {gpu}"
    assert fields["Expected hours"] == f"{hours} (estimate, not measured; recipes/README.md has the formula)"
    assert fields["Evaluation hours"].startswith(
        "14 more for all of reproduce.sh, at 3,000 tokens per second (estimate"
    )
    share = yaml.safe_load(path.read_text(encoding="utf-8"))["vllm_gpu_memory_utilization"] * memory
    needed = expected_memory(path)
    assert fields["Peak memory"].startswith(f"{needed:.0f} GB of {memory}, beside {share:.0f} GB for vLLM (estimate")
    assert needed + share < memory

    paper = paper_rows(hub_id, BENCHMARKS)
    shown = {
        line[4:14].strip(): [float(n) for n in line[14:].split("/")] for line in header if line.startswith("#   ")
    }
    if not paper:
        assert fields["The paper's numbers"].startswith("none") and not shown
    else:
        table = {"base": "base", "OPSD": f"OPSD, {TITLES[data]}", "purified": f"purified, {TITLES[data]}"}
        assert shown == {label: list(paper[row].values()) for label, row in table.items()}

    # The options that it names must parse and do what it says
    config = ["--config", str(path)]
    _, twin, _, _ = parse(config + shlex.split(fields["OPSD, the baseline"].removeprefix("add ")))
    _, ours, _, _ = parse(config)
    differing = {key for key, value in twin.to_dict().items() if value != ours.to_dict()[key]}
    assert differing - {"logging_dir", "run_name"} == {"target", "output_dir"}
    assert (twin.target, twin.output_dir) == ("teacher", f"outputs/{model}-opsd-{data}")
    ahead = shlex.split(fields[AHEAD].removeprefix("add "))
    _, training, _, _ = parse(config + ahead)
    assert (training.vllm_mode, training.vllm_adapter_sync, training.rollouts_ahead) == ("server", True, 1)
    parser = make_parser()
    added = shlex.split(fields["On 8 GPUs"].removeprefix("add "))
    *_, launcher = parser.parse_args_and_config([*config, *added, "--use_cpu", "True"], return_remaining_strings=True)
    launch = launch_command_parser().parse_args([*launcher, "-m", "purified_opsd_trl.train"])
    _, training, _, _ = parse(config + added)
    assert launch.multi_gpu and launch.num_processes == 8
    assert 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps == 32


@pytest.mark.parametrize("path", LONG, ids=["-".join(names(path)) for path in LONG])
def test_long_recipes_are_the_papers_but_for_the_length(path: Path) -> None:
    model, _ = names(path)
    short = {key: value for key, value in yaml.safe_load(path.with_name("config_dasd.yaml").read_text()).items()}
    long = yaml.safe_load(path.read_text())
    assert {key for key in long | short if long.get(key) != short.get(key)} == {
        *("max_completion_length", "vllm_max_model_length", "vllm_enable_sleep_mode", "output_dir"),
        *("padding_free", "train_token_budget", "offload_scores", "mask_truncated_completions"),
    }
    _, training, weights, _ = parse(["--config", str(path)])
    assert weights.model_name_or_path == MODELS[model][0]
    assert (training.max_completion_length, training.train_token_budget, training.padding_free) == (
        16384,
        32768,
        "auto",
    )
    assert training.output_dir == f"outputs/{model}-purified-dasd-16k"
    assert f"purified-opsd train --config {path.relative_to(ROOT)}" in path.read_text()


def test_the_recipe_with_the_reference_first_shares_its_prefix() -> None:
    path = ROOT / "recipes/Qwen3-8B/purified_opsd/config_dasd_reference_first.yaml"
    plain, ours = (yaml.safe_load(p.read_text()) for p in (path.with_name("config_dasd.yaml"), path))
    different = {key for key in plain | ours if plain.get(key) != ours.get(key)}
    assert different == {"teacher_prompt_template", "output_dir"}
    assert f"purified-opsd train --config {path.relative_to(ROOT)}" in path.read_text()
    _, training, _, _ = parse(["--config", str(path)])
    assert training.teacher_prompt_template == REFERENCE_FIRST_TEACHER_PROMPT_TEMPLATE
    row = {"prompt": "What is 1 + 1?", "reference": "two " * 100}
    contexts = build_contexts(
        row,
        reference_column="reference",
        teacher_prompt_template=training.teacher_prompt_template,
        reference_prompt_template=training.reference_prompt_template,
    )
    ids = {name: [list(getattr(contexts, name).encode())] for name in ("teacher", "reference_only")}
    assert len(shared_prefixes(ids)[0]) > len(row["reference"])


def small_run(model: Path, data: Path, folder: Path) -> list[str]:
    """Options of one short step on the CPU."""
    keys = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": folder / "run",
        "dtype": "float32",
        "use_vllm": False,
        "bf16": False,
        "max_steps": 1,
        "max_completion_length": 8,
        "mask_truncated_completions": False,  # eight tokens cut all of them off
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return [item for key, value in keys.items() for item in (f"--{key}", str(value))]


@pytest.mark.parametrize("path", RECIPES + LONG, ids=["-".join(names(path)) for path in RECIPES + LONG])
def test_one_step_on_a_tiny_model(path: Path, make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    model, _ = names(path)
    architecture, overrides, template = MODELS[model][3]
    folder = make_model_dir(architecture, template=template, **overrides)
    rows = [{"prompt": f"What is {i} + 1?", "reference": f"It is {i + 1}."} for i in range(4)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = main(*parse(["--config", str(path), *small_run(folder, data, tmp_path)]))
    assert trainer.state.global_step == 1
    assert type(trainer.model.base_model.model).__name__.lower() == f"{architecture}forcausallm"
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0.0 < entry["loss"] < 1.0 and entry["grad_norm"] > 0.0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


AT_DASD = [path for path in RECIPES if path.stem == "config_dasd"]


@pytest.mark.parametrize("path", AT_DASD, ids=[names(path)[0] for path in AT_DASD])
def test_steps_with_rollouts_ahead(path: Path, make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    fields = dict(line.removeprefix("# ").split(": ", 1) for line in header.splitlines() if ": " in line)
    architecture, overrides, template = MODELS[names(path)[0]][3]
    folder = make_model_dir(architecture, template=template, **overrides)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is {i}?", "reference": f"{i}."}) + "\n" for i in range(8)))
    server = LoraServer(folder, max_rank=64, max_model_len=8192)
    try:
        flags = [*small_run(folder, data, tmp_path), "--use_vllm", "true", "--max_steps", "2"]
        flags += ["--vllm_server_base_url", server.url, "--logging_steps", "1"]
        trainer = main(*parse(["--config", str(path), *shlex.split(fields[AHEAD].removeprefix("add ")), *flags]))
    finally:
        server.close()
    logged = [entry["rollout/staleness"] for entry in trainer.state.log_history if "rollout/staleness" in entry]
    assert logged == [0, 1]
    # The command in the recipe is the one that the trainer would ask for
    _, training, weights, _ = parse(["--config", str(path)])
    trainer.model.config._name_or_path = weights.model_name_or_path
    command = start_command(trainer.model, 1, training.vllm_max_model_length, "http://127.0.0.1:8000")
    assert fields["The server"] == command


def test_one_step_of_the_vision_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "recipes" / "Qwen3-VL-4B" / "purified_opsd" / "config_geometry.yaml"
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"# Command: purified-opsd train --config {path.relative_to(ROOT)}\n" in header
    _, twin, _, _ = parse(["--config", str(path), "--target", "teacher"])
    assert twin.target == "teacher" and twin.per_device_train_batch_size * twin.gradient_accumulation_steps == 32
    # The real processor can be loaded where torchvision is installed; this one has the same images and no videos
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: build_processor("qwen3_vl"))
    build_vlm("qwen3_vl").save_pretrained(tmp_path / "model")
    rows = [
        {"problem": r["prompt"][0]["content"], "solution": r["reference"], "image": r["image"]} for r in image_rows()
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "geometry.parquet")
    trainer = main(
        *parse(["--config", str(path), *small_run(tmp_path / "model", tmp_path / "geometry.parquet", tmp_path)])
    )
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0.0 < entry["loss"] < 1.0 and entry["grad_norm"] > 0.0
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all(".language_model.layers." in name for name in trained)
    assert "PeftModel.from_pretrained(AutoModelForImageTextToText" in (tmp_path / "run" / "README.md").read_text()


# Chat templates ------------------------------------------------------------------------------------------------------


USER = {"role": "user", "content": "What is 1 + 1?"}
CHATS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 2."}, USER],
]


@pytest.mark.parametrize("chat", CHATS, ids=["user", "system", "turns"])
@pytest.mark.parametrize(
    ("name", "original", "kwargs"),
    [
        ("qwen3", qwen3_chat_template, {"enable_thinking": True}),
        ("qwen3", qwen3_chat_template, {"enable_thinking": False}),
        ("deepseek_r1_distill", deepseek_r1_distill_chat_template, {}),
    ],
    ids=["qwen3", "qwen3_off", "r1"],
)
def test_fixtures_render_as_the_originals_that_trl_ships(
    name: str, original: str, kwargs: dict[str, Any], chat: list[dict[str, str]]
) -> None:
    tokenizer = build_tokenizer(name)
    texts = [
        tokenizer.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=True, **kwargs
        )
        for template in (None, original)
    ]
    assert texts[0] == texts[1]


def test_olmo3_thinks_and_states_that_it_has_no_functions() -> None:
    # TRL ships no copy of this one; these are the strings that the released template renders
    tokenizer = build_tokenizer("olmo3_think")
    text = tokenizer.apply_chat_template(CHATS[1], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief. You do not currently have access to any functions. <functions></functions>"
        "<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n<think>"
    )
    text = tokenizer.apply_chat_template(CHATS[0], tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are OLMo, a helpful function-calling AI assistant built by Ai2. ")


# Data ----------------------------------------------------------------------------------------------------------------


def dasd_rows() -> Iterator[dict[str, str]]:
    for i in range(40):
        yield {
            "uuid": str(i),
            "input": f"Wie groß ist {i} + {i}?\n",
            "output": f"<think>\nwait, {i} twice\n</think>\n\nIt is ${2 * i}$.",
            "domain": "math" if i % 2 else "code",
        }
    yield {"uuid": "cut", "input": "Cut off?", "output": "<think>\nhm\n</think>\n", "domain": "math"}
    yield {"uuid": "none", "input": "", "output": "An answer.", "domain": "math"}


def build(*argv: str | Path) -> None:
    build_data.main([str(item) for item in argv])


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def test_the_subset_is_the_same_on_every_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(dasd_rows())
    write_jsonl(tmp_path / "one" / "train.jsonl", rows)
    write_jsonl(tmp_path / "two" / "train-00000.jsonl", rows[30:])  # other order, other files
    write_jsonl(tmp_path / "two" / "train-00001.jsonl", rows[:30][::-1])
    outputs = []
    for folder in ("one", "two"):
        output = tmp_path / f"{folder}.jsonl"
        build("dasd", "--dataset", tmp_path / folder, "--size", "5", "--output", output)
        outputs.append(output.read_bytes())
        assert capsys.readouterr().out.splitlines()[-1] == f"sha256: {hashlib.sha256(outputs[-1]).hexdigest()}"
    assert outputs[0] == outputs[1]
    assert hashlib.sha256(outputs[0]).hexdigest() == "9b53b6d1431203eb33a3e2b92322adebf3d5307448d0885e3487f5b8780966dc"
    chosen = [json.loads(line) for line in outputs[0].decode().splitlines()]
    assert len(chosen) == 5 and all(set(row) == {"prompt", "reference"} for row in chosen)
    for row in chosen:
        number = int(re.fullmatch(r"Wie groß ist (\d+) \+ \1\?", row["prompt"])[1])
        assert number % 2 == 1 and row["reference"] == f"It is ${2 * number}$."


def test_thinking_and_other_domains_can_be_kept(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "train.jsonl", list(dasd_rows()))
    output = tmp_path / "out.jsonl"
    options = ("--domain", "all", "--reference", "full", "--size", "41", "--seed", "1")
    build("dasd", "--dataset", tmp_path / "data", *options, "--output", output)
    chosen = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(chosen) == 41 and all(row["reference"].startswith("<think>\n") for row in chosen)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["mathcot"], "the paper gives no hub id"),
        (["dasd", "--dataset", "no/such"], "cannot be loaded"),
        (["dasd", "--dataset", "{data}"], "19 usable rows of the domain `math`"),
        (["mathcot", "--dataset", "{data}"], "no column `question`; it has `uuid`, `input`"),
    ],
    ids=["unset", "missing", "small", "column"],
)
def test_data_that_cannot_be_built(argv: list[str], said: str, tmp_path: Path) -> None:
    rows = [row for row in dasd_rows() if row["uuid"] != "1"]
    write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(SystemExit) as stopped:
        build(*[item.format(data=tmp_path) for item in argv], "--output", tmp_path / "out.jsonl")
    assert str(stopped.value).startswith("error: ") and said in str(stopped.value)
    assert not (tmp_path / "out.jsonl").exists()


# reproduce.sh --------------------------------------------------------------------------------------------------------


def reproduce(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(ROOT / "recipes/reproduce.sh"), *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, **environment},
    )


@pytest.mark.parametrize("argv", [(), ("Qwen3-8B",), ("Qwen3-8B", "gsm8k"), ("gpt-5", "dasd")], ids=str)
def test_reproduce_lists_what_there_is(argv: tuple[str, ...]) -> None:
    result = reproduce(*argv)
    assert result.returncode == 2 and not result.stdout
    listed = {tuple(line.split()) for line in result.stderr.splitlines() if line.startswith("    ")}
    assert listed == {names(path) for path in RECIPES}


def test_reproduce_needs_the_data_that_has_no_hub_id() -> None:
    result = reproduce("Qwen3-8B", "mathcot", DRY_RUN="1")
    assert result.returncode == 2 and "DATASET" in result.stderr and not result.stdout


@pytest.mark.parametrize(("model", "data"), [("Qwen3-8B", "dasd"), ("Olmo-3-7B-Think", "mathcot")])
def test_what_reproduce_would_run_parses(
    model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    result = reproduce(
        model,
        data,
        DRY_RUN="1",
        DATASET="some/data",
        OUTPUT=str(tmp_path),
        TRAIN_ARGS="--multi_gpu --num_processes 8 --gradient_accumulation_steps 1",
        EVAL_ARGS="--vllm_tensor_parallel_size 8",
    )
    assert result.returncode == 0, result.stderr
    build_line, opsd, purified, evaluate, compare = map(shlex.split, result.stdout.splitlines())
    assert build_line[:3] == ["python", "recipes/build_data.py", data]
    outputs = []
    for command, target in ((opsd, "teacher"), (purified, "purified")):
        assert command[:2] == ["purified-opsd", "train"]
        script, training, weights, _ = parse(command[2:])
        assert training.target == target and training.gradient_accumulation_steps == 1
        assert weights.model_name_or_path == MODELS[model][0]
        assert script.dataset_name == build_line[build_line.index("--output") + 1]
        outputs.append(training.output_dir)
    assert evaluate[:2] == compare[:2] == ["purified-opsd", "evaluate"]
    args = parse_evaluate(evaluate[2:])
    assert (args.model_name_or_path, args.checkpoints, args.benchmarks) == (MODELS[model][0], outputs, BENCHMARKS)
    assert (args.num_generations, args.vllm_tensor_parallel_size) == (12, 8)
    assert args.thinking == ("on" if model.startswith("Qwen3") else "template")
    compared = parse_evaluate(compare[2:]).compare
    assert compared[0] == f"{args.output_dir}/{model}/results.json"
    runs = [f"{args.output_dir}/{Path(output).name}-checkpoint-*/results.json" for output in outputs]
    assert compared[1:] == runs


@pytest.mark.parametrize(
    ("written", "resumes"), [("trainer_state.json", "true"), ("optimizer.pt", None)], ids=["complete", "incomplete"]
)
def test_reproduce_continues_where_it_stopped(tmp_path: Path, written: str, resumes: str | None) -> None:
    done, begun = tmp_path / "Qwen3-4B-opsd-dasd", tmp_path / "Qwen3-4B-purified-dasd"
    checkpoint = begun / "checkpoint-50"
    for file in (tmp_path / "data/dasd_10k.jsonl", done / "adapter_model.safetensors", checkpoint / written):
        file.parent.mkdir(parents=True)
        file.touch()
    result = reproduce("Qwen3-4B", "dasd", DRY_RUN="1", OUTPUT=str(tmp_path))
    assert result.returncode == 0, result.stderr
    train, evaluate, compare = map(shlex.split, result.stdout.splitlines())
    _, training, _, _ = parse(train[2:])
    assert (training.target, training.resume_from_checkpoint) == ("purified", resumes)
    assert evaluate[2] == "--model_name_or_path" and compare[2] == "--compare"


@pytest.mark.slow
def test_reproduce_from_data_to_comparison(make_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model_dir("qwen3", template="qwen3")
    write_jsonl(tmp_path / "dasd" / "train.jsonl", list(dasd_rows()))
    rows = tmp_path / "outputs" / "data" / "dasd_10k.jsonl"
    build("dasd", "--dataset", tmp_path / "dasd", "--size", "8", "--output", rows)
    problems = tmp_path / "problems.jsonl"
    write_jsonl(problems, [{"problem": "What is 1 + 1?", "answer": "2"}, {"problem": "And 2 + 2?", "answer": "4"}])
    train_args = (
        "--dtype float32 --use_vllm False --use_cpu True --bf16 False --mixed_precision no --max_steps 2 "
        "--save_steps 1 --max_completion_length 8 --per_device_train_batch_size 1 --gradient_accumulation_steps 1"
    )
    result = reproduce(
        "Qwen3-0.6B",
        "dasd",
        OUTPUT=str(tmp_path / "outputs"),
        MODEL_PATH=str(folder),
        TRAIN_ARGS=train_args,
        EVAL_ARGS=f"--benchmarks {problems} --num_generations 2 --max_completion_length 8 --backend transformers",
    )
    assert result.returncode == 0, result.stderr
    evaluation = tmp_path / "outputs" / "Qwen3-0.6B-dasd-evaluation"
    comparison = json.loads((evaluation / "comparison" / "comparison.json").read_text())
    runs = [f"Qwen3-0.6B-{method}-dasd-checkpoint-{step}" for method in ("opsd", "purified") for step in (1, 2)]
    assert list(comparison["table"]["problems"]) == [folder.name, *runs]
