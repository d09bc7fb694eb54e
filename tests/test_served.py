"""Rollouts from a server with adapters by name: which version writes which batch, resuming, servers that fail."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback, set_seed

from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer
from purified_opsd_trl.bench.pipeline import predicted
from purified_opsd_trl.cli import main as cli
from purified_opsd_trl.errors import InputError

from .browser import CHROMIUM, accessibility_violations, html_errors, overflow
from .conftest import free_port
from .lora_server import LoraServer


ROWS = [
    {"prompt": [{"role": "user", "content": f"what is {i} + {i * 3}?"}], "reference": f"{4 * i}"} for i in range(12)
]
NEW_TOKENS = 6


@pytest.fixture
def serve(model_dir: Path) -> Iterator[Callable[..., LoraServer]]:
    servers: list[LoraServer] = []

    def start(folder: Path = model_dir, **settings: Any) -> LoraServer:
        servers.append(LoraServer(folder, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


class Watcher(TrainerCallback):
    """Weights at the beginning of each step, and the completions of the batch that it trained on."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.rollouts: dict[int, tuple[list[list[int]], list[list[int]]]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.weights[state.global_step] = {name: p.detach().clone() for name, p in named if p.requires_grad}

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.random_state = torch.get_rng_state()


@pytest.fixture
def build(model_dir: Path, arguments: dict[str, Any]) -> Callable[..., tuple[PurifiedOPSDTrainer, Watcher]]:
    """A trainer that writes greedily, with a learning rate at which each step changes what it writes."""

    def get(*servers: LoraServer, **fields: Any) -> tuple[PurifiedOPSDTrainer, Watcher]:
        set_seed(0)
        served = {
            "use_vllm": True,
            "vllm_mode": "server",
            "vllm_adapter_sync": True,
            "vllm_server_base_url": [server.url for server in servers],
            "vllm_server_timeout": 1.0,
        }
        args = PurifiedOPSDConfig(
            **{
                **arguments,
                **(served if servers else {}),
                "generation_kwargs": {"temperature": 0.0} if servers else {"do_sample": False},
                "max_completion_length": NEW_TOKENS,
                "model_init_kwargs": {"dtype": "float32", "attn_implementation": "eager"},
                "learning_rate": 2e-2,
                "lr_scheduler_type": "constant",
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "max_steps": 6,  # of 3 per epoch
                "decomposition_steps": 0,
                **fields,
            }
        )
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        watcher = Watcher()
        trainer = PurifiedOPSDTrainer(
            str(model_dir),
            args,
            Dataset.from_list(ROWS),
            Dataset.from_list(ROWS[:2]),
            None,
            [watcher],
            peft_config=lora,
        )
        generate = trainer._generate_single_turn

        def watched(prompt_ids: list[list[int]], *rest: Any) -> list[list[int]]:
            found = generate(prompt_ids, *rest)
            if trainer.model.training:
                watcher.rollouts[trainer.state.global_step] = prompt_ids, found
            return found

        trainer._generate_single_turn = watched  # type: ignore[method-assign]
        return trainer, watcher

    return get


@torch.no_grad()
def greedy(
    trainer: PurifiedOPSDTrainer, weights: dict[str, torch.Tensor], prompts: list[list[int]]
) -> list[list[int]]:
    """What transformers writes with given adapter weights."""
    model = trainer.model.eval()
    model.load_state_dict(weights, strict=False)
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        limits = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 256}
        outputs.append(model.generate(input_ids=ids, attention_mask=mask, **limits)[0, len(prompt) :].tolist())
    return outputs


def check_versions(trainer: PurifiedOPSDTrainer, watcher: Watcher, ahead: int) -> int:
    """Every batch is of version `step - ahead`. Returns for how many the versions before and after write another."""
    told_apart = 0
    for step, (prompts, found) in watcher.rollouts.items():
        version = max(step - ahead, 0)
        assert found == greedy(trainer, watcher.weights[version], prompts)
        neighbors = [v for v in (version - 1, version + 1) if v in watcher.weights]
        told_apart += all(found != greedy(trainer, watcher.weights[v], prompts) for v in neighbors)
    return told_apart


def history(trainer: PurifiedOPSDTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_batch_is_written_by_the_adapter_of_so_many_steps_before(
    build: Any, serve: Any, ahead: int, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()
    trainer, watcher = build(server, rollouts_ahead=ahead)
    trainer.train()
    assert sorted(watcher.rollouts) == list(range(6))
    assert check_versions(trainer, watcher, ahead) >= 4
    assert history(trainer, "rollout/staleness") == [min(step, ahead) for step in range(6)]
    assert server.adapters == set() and not list(Path(trainer.args.output_dir, "_adapters").iterdir())
    assert server.most_adapters == ahead + 1  # what `--max-loras` must be
    assert sum(rows for _, rows in server.written) == 6 * 4  # each row is requested once


def test_the_report_shows_who_worked_when(build: Any, serve: Any, tmp_path: Path) -> None:
    trainer, _ = build(serve(), rollouts_ahead=1)
    trainer.train()
    report = Path(trainer.args.output_dir) / "report.html"
    text = report.read_text(encoding="utf-8")
    assert "Who worked when: the last 6 steps" in text
    assert all(f"trains step {step}:" in text for step in range(1, 7))
    assert html_errors(text) == []
    if CHROMIUM is not None:
        assert overflow(report, tmp_path, 360) == [] and accessibility_violations(report, tmp_path, dark=False) == []


def test_without_batches_ahead_it_is_the_rollout_of_transformers(build: Any, serve: Any) -> None:
    served, watched = build(serve())
    own, expected = build()
    served.train()
    own.train()
    assert watched.rollouts == expected.rollouts
    assert history(served, "loss") == pytest.approx(history(own, "loss"), rel=1e-5)  # fp32, to rounding


def test_evaluation_uses_the_weights_of_the_moment(build: Any, serve: Any) -> None:
    trainer, watcher = build(serve(), rollouts_ahead=2, max_steps=4, eval_strategy="steps", eval_steps=2)
    seen: list[tuple[int, list[list[int]], list[list[int]]]] = []
    generate = trainer._generate_single_turn

    def watched(prompt_ids: list[list[int]], *rest: Any) -> list[list[int]]:
        found = generate(prompt_ids, *rest)
        if not trainer.model.training:
            seen.append((trainer.state.global_step, prompt_ids, found))
        return found

    trainer._generate_single_turn = watched
    trainer.train()
    at_step_2 = [(prompts, found) for step, prompts, found in seen if step == 2]
    assert at_step_2
    for prompts, found in at_step_2:
        assert found == greedy(trainer, watcher.weights[2], prompts) != greedy(trainer, watcher.weights[0], prompts)
    trainer.evaluate()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.evaluate()  # after changes that no step made
    step, prompts, found = seen[-1]
    assert found == greedy(trainer, weights, prompts)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(build: Any, serve: Any, ahead: int) -> None:
    server = serve()
    straight, expected = build(server, rollouts_ahead=ahead, save_strategy="steps", save_steps=4)
    straight.train()
    resumed, watcher = build(server, rollouts_ahead=ahead)
    resumed.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-4")
    assert watcher.rollouts == {step: expected.rollouts[step] for step in (4, 5)}
    assert history(resumed, "loss")[-2:] == history(straight, "loss")[-2:]
    assert history(resumed, "rollout/staleness")[-2:] == [ahead] * 2
    weights = dict(straight.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_other_rows_than_requested_are_an_error(build: Any, serve: Any) -> None:
    trainer, _ = build(serve(), rollouts_ahead=1)
    trainer.train_dataset = trainer.train_dataset.select(range(12))
    loader = trainer.get_train_dataloader

    def reversed_loader() -> Any:
        made = loader()
        trainer.train_dataset = trainer.train_dataset.select(range(11, -1, -1))
        return made

    trainer.get_train_dataloader = reversed_loader
    with pytest.raises(RuntimeError, match="not those that were requested ahead"):
        trainer.train()


# Servers that fail ---------------------------------------------------------------------------------------------------


def test_rows_are_divided_and_go_to_the_servers_that_are_left(
    build: Any, serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    servers = serve(), serve()
    servers[0].abort_after = 2
    trainer, watcher = build(*servers, rollouts_ahead=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    check_versions(trainer, watcher, 1)
    assert [rows for _, rows in servers[0].written] == [2, 2, 2]
    assert caplog.text.count(f"{servers[0].url} is lost") == 1
    assert sum(rows for _, rows in servers[1].written) == 6 * 4 - 2 * 2


def test_a_server_that_answers_again_is_used_again(build: Any, serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    servers = serve(port=port), serve()
    trainer, watcher = build(*servers, rollouts_ahead=1)

    class Restart(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                servers[0].close()
            if state.global_step == 3:
                self.server = serve(port=port)

    restart = Restart()
    trainer.add_callback(restart)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "answers again" in caplog.text
    assert restart.server.written
    check_versions(trainer, watcher, 1)


def test_without_any_server_what_was_trained_is_saved(build: Any, serve: Any) -> None:
    server = serve()
    server.abort_after = 3  # batch 3, the first of the second epoch, does not come
    trainer, before = build(server, rollouts_ahead=1)
    with pytest.raises(ConnectionError, match=f"No vLLM server answers: {re.escape(server.url)}"):
        trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-3"
    saved = torch.load(checkpoint / "rng_state.pth", weights_only=False)["cpu"]
    assert torch.equal(saved, before.random_state)  # as after the third step: the second epoch draws from it again
    resumed, watcher = build(serve(), rollouts_ahead=1)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert sorted(watcher.rollouts) == [3, 4, 5]
    watcher.weights = {**before.weights, **watcher.weights}
    check_versions(resumed, watcher, 1)


def test_a_slow_server_counts_as_lost(build: Any, serve: Any) -> None:
    server = serve()
    trainer, _ = build(server, vllm_request_timeout=0.5)
    server.delay = 2.0
    with pytest.raises(ConnectionError, match="No vLLM server answers|is lost"):
        trainer._pool.wait = 0.0
        server.answer = lambda path, request: (
            (503, "") if path == "/health" else type(server).answer(server, path, request)
        )
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": False}, "started without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1. Start the server with: VLLM_ALLOW"),
        ({"max_rank": 2}, "LoRA rank 4 is greater than 2. Start the server with: .* --max-lora-rank 8"),
        ({"key": "secret"}, "refuses the key .status 401.. Set VLLM_API_KEY"),
        ({"max_model_len": 30}, "holds sequences of 30 tokens, but the longest prompt and `max_completion_length` "),
    ],
    ids=["no_lora", "rank", "key", "length"],
)
def test_a_server_that_cannot_be_used(build: Any, serve: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(serve(**settings))


def test_the_key_of_the_environment_is_sent(build: Any, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    build(serve(key="secret"))


def test_no_server_or_none_of_vllm(build: Any, serve: Any) -> None:
    down = serve()
    down.close()
    with pytest.raises(InputError, match=f"no vLLM server answers at {re.escape(down.url)} after 1 s"):
        build(down)
    other = serve()
    other.answer = lambda path, request: (200, "") if path == "/health" else (404, "not found")
    with pytest.raises(InputError, match="is no vLLM server .status 404"):
        build(other)


def test_another_model_is_found_before_the_first_step(
    build: Any, serve: Any, make_model_dir: Callable[..., Path]
) -> None:
    trainer, _ = build(serve(make_model_dir(seed=1)))
    with pytest.raises(InputError, match="is not the model in training: .* differ by .* nats"):
        trainer.train()


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"choices": [{"index": 0, "token_ids": None, "finish_reason": "stop", "prompt_token_ids": [1]}]},
        "text",
    ],
    ids=["empty", "no_choices", "other_prompt", "text"],
)
def test_an_answer_that_is_none(build: Any, serve: Any, answer: Any) -> None:
    server = serve()
    trainer, _ = build(server)
    server.nonsense = answer
    with pytest.raises(InputError, match=f"{re.escape(server.url)} does not answer as `vllm serve` does"):
        trainer.train()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vllm_adapter_sync": True}, "`vllm_adapter_sync` needs `use_vllm: true`"),
        (
            {"use_vllm": True, "vllm_adapter_sync": True, "vllm_enable_sleep_mode": True},
            "`vllm_adapter_sync` with `vllm_mode: colocate` needs `vllm_enable_sleep_mode: false`",
        ),
        ({"rollouts_ahead": 1}, "`rollouts_ahead` needs a server"),
        ({"rollouts_ahead": -1}, "`rollouts_ahead` must be an integer at least 0"),
        ({"vllm_server_base_url": ["http://a", "http://b"]}, "must be one address without"),
        (
            {
                **{"use_vllm": True, "vllm_mode": "server", "vllm_adapter_sync": True, "rollouts_ahead": 1},
                "loss_type": "sampled_token",
            },
            "`loss_type: sampled_token` weights tokens as if",
        ),
    ],
    ids=["vllm", "asleep", "ahead", "negative", "addresses", "sampled_token"],
)
def test_settings_that_do_not_go_together(arguments: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PurifiedOPSDConfig(**arguments, **fields)


def test_what_cannot_be_served(build: Any, serve: Any, model_dir: Path, arguments: dict[str, Any]) -> None:
    trainer, _ = build(serve(), rollouts_ahead=1)
    data = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(InputError, match="a stream cannot"):
        PurifiedOPSDTrainer(str(model_dir), trainer.args, data, peft_config=LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="all weights are trained"):
        PurifiedOPSDTrainer(str(model_dir), trainer.args, trainer.train_dataset)
    head = LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    with pytest.raises(InputError, match="the adapter also trains .*lm_head"):
        PurifiedOPSDTrainer(str(model_dir), trainer.args, trainer.train_dataset, peft_config=head)


def test_sampling_parameters_are_those_of_trl(build: Any, serve: Any) -> None:
    trainer, _ = build(
        serve(), temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1, generation_kwargs={"seed": 3}
    )
    assert trainer._sampling() == {
        **{"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 3},
        **{"max_tokens": NEW_TOKENS, "stop_token_ids": trainer.eos_token_ids},
    }


def test_adapters_of_a_killed_session_are_removed(build: Any, serve: Any, tmp_path: Path) -> None:
    server = serve()
    trainer, _ = build(server, rollouts_ahead=1, max_steps=3, save_strategy="steps", save_steps=1)
    trainer.train()
    run = json.loads((Path(trainer.args.output_dir) / "checkpoint-2" / "run_state.json").read_text())["run_id"]
    folder = Path(trainer.args.output_dir) / "_adapters"
    left = folder / f"{run}-0000-v2"
    left.mkdir(parents=True)
    server.adapters.add(left.name)
    resumed, _ = build(server, rollouts_ahead=1, max_steps=3)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    assert left.name not in server.adapters and not left.exists()


def test_the_benchmark_measures_the_overlap(serve: Any, model_dir: Path, tmp_path: Path) -> None:
    server = serve()
    server.delay = 3.0  # as if written on another machine: without it the same cores would do both
    flags = {"model_name_or_path": model_dir, "servers": server.url, "steps": 6, "completion_length": 4, "lora_r": 4}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert cli(["bench", "pipeline", *words, "--ahead", "0", "1", "--output_dir", str(tmp_path)]) == 0
    runs = json.loads((tmp_path / "pipeline.json").read_text())["runs"]
    assert runs["0"]["steps"] == runs["1"]["steps"] == 3
    assert runs["0"]["wait"] >= 3.0
    assert runs["1"]["wait"] < runs["0"]["wait"]  # a part of it lies under the step before
    assert runs["1"]["idle"] < runs["0"]["idle"]
    assert predicted({"seconds": 5.0, "wait": 3.0}, 1) == 3.0 and predicted({"seconds": 5.0, "wait": 1.0}, 2) == 4.0
    assert predicted({"seconds": 5.0, "wait": 3.0}, 0) == 5.0
