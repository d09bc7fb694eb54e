"""What the self-check finds, what it mends, and that it raises no false alarm."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from purified_opsd_trl import LMHead, PurifiedOPSDConfig, PurifiedOPSDTrainer
from purified_opsd_trl.backbone import longest_alike, runs_rows_apart
from purified_opsd_trl.deviations import LONG, coarsest_dtype, deviations, tolerance
from purified_opsd_trl.errors import InputError
from purified_opsd_trl.self_check import missing_layers
from tests.architectures import toy_model


ROWS = [{"prompt": [{"role": "user", "content": "q" * n}], "reference": "r"} for n in (2, 19, 7, 31)]
ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {
            "num_key_value_heads": 2,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                **ROPE,
                **{"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8},
            },
        },
    ),
    "dynamic": (
        "llama",
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
}


@pytest.fixture
def build(tokenizer: Any, arguments: dict[str, Any]) -> Callable[..., PurifiedOPSDTrainer]:
    def make(model: PreTrainedModel, rows: Any = ROWS, kind: type = PurifiedOPSDTrainer, **kwargs: Any) -> Any:
        config = PurifiedOPSDConfig(**{**arguments, "max_steps": 1, "per_device_train_batch_size": 4, **kwargs})
        return kind(model, config, Dataset.from_list(rows), processing_class=tokenizer)

    return make


class TowardsBase(PurifiedOPSDTrainer):
    def target_logits(self, teacher: torch.Tensor, reference_only: torch.Tensor, base: torch.Tensor) -> Any:
        return base


@pytest.mark.parametrize("rope", ROPES)
def test_long_rows_do_not_change_the_rotary_embedding_of_short_ones(
    make_model: Callable[..., PreTrainedModel], build: Callable[..., Any], rope: str
) -> None:
    """Scores in one batch equal the model's own logits of single rows; the unmoved student's loss is 0."""
    family, fields = ROPES[rope]
    trainer = build(make_model(family, **fields), rows=ROWS, kind=TowardsBase, scoring_batch_size=8)
    # Rows of 30 to 130 tokens, on both sides of 64
    prompts = {"teacher": [[*range(40, 60)], [*range(60, 170)], [*range(60, 130)]], "base": [[5, 6], [7], [8]]}
    completions = [[30, 31, 32, 33], [34, 35], [*range(36, 96)]]
    scores = trainer.scoring_callback.score(prompts, completions)
    for context, rows in prompts.items():
        for row, (prompt, completion) in enumerate(zip(rows, completions, strict=True)):
            fresh = make_model(family, **fields)  # dynamic scaling remembers the longest row
            with torch.no_grad():
                own = fresh(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            ours = scores.head.logits(scores.hidden[context][row, : len(completion)])
            torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"]) < 1e-6


@pytest.mark.parametrize("rope", ROPES)
def test_a_student_with_rows_of_several_lengths_has_no_loss_towards_its_base(
    make_model: Callable[..., PreTrainedModel], build: Callable[..., Any], rope: str
) -> None:
    family, fields = ROPES[rope]
    rows = [{"prompt": [{"role": "user", "content": "q" * n}], "reference": "r"} for n in (2, 90, 7, 60)]
    trainer = build(make_model(family, **fields), rows=rows, kind=TowardsBase, scoring_batch_size=1)
    assert longest_alike(trainer.model) in (63, 64)
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"]) < 1e-6  # 0.01 and more where rows run together


def test_a_model_that_padding_changes_runs_row_by_row_and_says_so(
    build: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build(toy_model("rwkv"), kind=TowardsBase, self_check=True)
    with caplog.at_level(logging.WARNING, logger="purified_opsd_trl"):
        trainer.train()
    assert abs(trainer.state.log_history[0]["loss"]) < 1e-6
    assert runs_rows_apart(trainer.model) and trainer.purification_collator.max_sequences == 1
    assert "(rwkv, torch.float32" in caplog.text and "use_vllm" in caplog.text


def test_without_the_self_check_nothing_is_mended(build: Callable[..., Any]) -> None:
    trainer = build(toy_model("rwkv"), kind=TowardsBase, self_check=False, scoring_batch_size=1)
    trainer.train()
    assert not runs_rows_apart(trainer.model) and trainer.state.log_history[0]["loss"] > 1e-3


def test_a_frozen_head_other_than_the_students_is_refused(
    make_model: Callable[..., PreTrainedModel], build: Callable[..., Any]
) -> None:
    trainer = build(make_model())
    with torch.no_grad():
        trainer.scoring_callback.teacher_model.lm_head.weight[5] += 1.0
    with pytest.raises(InputError, match="unmoved student has a loss of .* nats per token towards itself"):
        trainer.train()


@pytest.mark.parametrize("kind", ["adapter", "copy"])
def test_a_policy_other_than_the_initial_one_is_said(
    make_model: Callable[..., PreTrainedModel],
    build: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    model: Any = make_model()
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    trainer = build(model)
    if kind == "copy":
        with torch.no_grad():
            trainer.scoring_callback.teacher_model.model.norm.weight[:9] += 1.0
    with caplog.at_level(logging.WARNING, logger="purified_opsd_trl.self_check"):
        trainer.check_model()
    (message,) = [record.message for record in caplog.records if record.name == "purified_opsd_trl.self_check"]
    assert "not the policy that training starts from" in message
    assert ("merge it" in message) == (kind == "adapter")


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_without_gradient_is_named(
    make_model: Callable[..., PreTrainedModel], build: Callable[..., Any], layer: int
) -> None:
    model = make_model()
    detached = model.model.layers[layer]
    attention, mlp = detached.self_attn, detached.mlp
    attention.register_forward_hook(lambda module, args, output: (output[0].detach(), *output[1:]))
    mlp.register_forward_hook(lambda module, args, output: output.detach())
    trainer = build(get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"])))
    with pytest.raises(InputError, match=rf"no gradient reaches .*layers\.{layer},"):
        trainer.train()


def test_ends_of_a_stack_of_layers() -> None:
    sums = {"m.layers.0": 0.0, "m.layers.1": 2.0, "m.layers.10": 1.0, "vision.blocks.0": 0.0, "vision.blocks.1": 0.0}
    assert missing_layers(sums) == ["m.layers.0"]  # text reaches no vision tower
    assert missing_layers({**sums, "m.layers.0": 1.0, "m.layers.1": 0.0}) == []  # what lies between is not judged
    assert missing_layers({"m.layers.0": 0.0, "m.layers.3": 0.0}) == ["m.layers.0", "m.layers.3"]
    assert missing_layers({}) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi", "qwen3_moe", "gpt2", "lfm2"])
def test_rounding_raises_no_alarm(family: str, dtype: torch.dtype) -> None:
    model = toy_model(family).to(dtype)
    ids = torch.randint(3, 250, (LONG,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        found = deviations(model, ids, 0, torch.device("cpu"))
    most = tolerance(coarsest_dtype(model), 2, found.rounding)
    assert max(found.head, found.later, found.together) < most / 2
    assert most < 0.1  # and an error would still be seen


def test_a_head_that_is_read_wrongly_is_far_beyond_rounding(make_model: Callable[..., PreTrainedModel]) -> None:
    """Half precision included: the scale of the logits, off by a third, is found."""
    model = make_model("cohere").to(torch.bfloat16)
    model.logit_scale *= 1.5  # of the forward; the configuration keeps the old one
    with torch.no_grad():
        found = deviations(model, [*range(3, 163)], 0, torch.device("cpu"))
    assert found.head > 3 * tolerance(torch.bfloat16, 2, found.rounding)
    assert LMHead.from_model(model).logit_scale == 0.6


def test_evaluation_alone_is_checked(make_model: Callable[..., PreTrainedModel], build: Callable[..., Any]) -> None:
    trainer = build(make_model())
    with torch.no_grad():
        trainer.scoring_callback.teacher_model.lm_head.weight[5] += 1.0
    with pytest.raises(InputError, match="towards itself"):
        trainer.evaluate(Dataset.from_list(ROWS[:2]))
