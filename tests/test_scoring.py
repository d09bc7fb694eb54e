"""Scores of the self-teacher against separate dense forwards."""

import copy
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer
from purified_opsd_trl.backbone import why_not_shareable
from purified_opsd_trl.config import REFERENCE_FIRST_TEACHER_PROMPT_TEMPLATE


PROMPTS = {
    "base": [[65, 66, 67], [68]],
    "teacher": [[65, 66, 67, 70, 71, 72], [68, 70, 71, 72, 73, 74, 75, 76]],
    "reference_only": [[70, 71, 72], [70, 71, 72, 73, 74, 75, 76]],
}
COMPLETIONS = [[97, 98, 99, 100], [101, 102]]


def build_trainer(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset,
    arguments: dict[str, Any],
    lora: bool = True,
    **kwargs: Any,
) -> PurifiedOPSDTrainer:
    return PurifiedOPSDTrainer(
        model=model,
        args=PurifiedOPSDConfig(**{**arguments, **kwargs}),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if lora else None,
    )


PADDING = ("false", "true")  # `padding_free`


@pytest.fixture(params=itertools.product(("lora", "full", "live", "softcap"), PADDING), ids="-".join)
def trainer(
    request: pytest.FixtureRequest,
    make_model: Callable[..., PreTrainedModel],
    tokenizer: Any,
    conversational_dataset: Dataset,
    arguments: dict[str, Any],
) -> PurifiedOPSDTrainer:
    kind, padding_free = request.param
    model = make_model("gemma2" if kind == "softcap" else "qwen3")
    trainer = build_trainer(
        model,
        tokenizer,
        conversational_dataset,
        arguments,
        lora=kind == "lora",
        temperature=0.8,
        teacher_model_kind="live" if kind == "live" else "base",
        padding_free=padding_free,
    )
    trainer.initial = copy.deepcopy(make_model("gemma2" if kind == "softcap" else "qwen3"))
    if kind != "live":  # move the student: the scores must not follow
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
    return trainer


def dense_log_probs(trainer: PurifiedOPSDTrainer, context: str, row: int) -> torch.Tensor:
    prompt, completion = PROMPTS[context][row], COMPLETIONS[row]
    with torch.no_grad():
        logits = trainer.initial.double()(input_ids=torch.tensor([prompt + completion])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1] / 0.8, dim=-1)


def test_log_probs_of_any_token_under_any_context(trainer: PurifiedOPSDTrainer) -> None:
    scores = trainer.scoring_callback.score(PROMPTS, COMPLETIONS)
    alternatives = torch.arange(2 * 4 * 5).view(2, 4, 5) % 270
    for context in PROMPTS:
        log_probs = scores.log_probs(alternatives, context)
        for row, completion in enumerate(COMPLETIONS):
            n = len(completion)
            expected = dense_log_probs(trainer, context, row).gather(-1, alternatives[row, :n])
            torch.testing.assert_close(log_probs[row, :n].double(), expected, rtol=1e-4, atol=1e-5)
            assert not log_probs[row, n:].any()


def test_contrasts_read_off_what_reference_and_question_add(trainer: PurifiedOPSDTrainer) -> None:
    scores = trainer.scoring_callback.score(PROMPTS, COMPLETIONS)
    sampled = torch.tensor([[97, 98, 99, 100], [101, 102, 0, 0]])
    for without in ("base", "reference_only"):
        contrast = scores.contrast(sampled, "teacher", without)
        for row, completion in enumerate(COMPLETIONS):
            ids = torch.tensor(completion).unsqueeze(-1)
            expected = dense_log_probs(trainer, "teacher", row) - dense_log_probs(trainer, without, row)
            torch.testing.assert_close(
                contrast[row, : len(completion)].double(), expected.gather(-1, ids)[:, 0], rtol=1e-4, atol=1e-5
            )


def test_scores_do_not_depend_on_batching(trainer: PurifiedOPSDTrainer) -> None:
    together = trainer.scoring_callback.score(PROMPTS, COMPLETIONS)
    trainer.purification_collator.max_sequences = 1
    alone = trainer.scoring_callback.score(PROMPTS, COMPLETIONS)
    for context in PROMPTS:
        torch.testing.assert_close(together.hidden[context], alone.hidden[context], rtol=1e-4, atol=1e-5)
    packed = trainer.args.padding_free == "true"
    assert alone.stats.forwards == (5 if packed else 6) and alone.stats.padded_tokens == alone.stats.tokens
    assert (together.stats.padded_tokens == together.stats.tokens) == packed
    assert (
        together.stats.tokens
        == alone.stats.tokens
        == sum(len(p) + len(c) for rows in PROMPTS.values() for p, c in zip(rows, COMPLETIONS, strict=True))
    )


def test_scoring_leaves_mode_adapter_and_gradients_alone(trainer: PurifiedOPSDTrainer) -> None:
    trainer.model.train()
    flags = [parameter.requires_grad for parameter in trainer.model.parameters()]
    scores = trainer.scoring_callback.score(PROMPTS, COMPLETIONS)
    assert trainer.model.training
    assert flags == [parameter.requires_grad for parameter in trainer.model.parameters()]
    assert not any(hidden.requires_grad for hidden in scores.hidden.values())


CUDA = torch.device("cuda", 0)


class OnCuda(torch.Tensor):
    """A tensor that would be on the accelerator."""


class PlayedCuda(TorchFunctionMode):
    """Runs on the CPU what is asked of an accelerator that this machine lacks, and keeps track of what is where."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__ and isinstance(args[0], OnCuda):
            return CUDA
        where = kwargs.get("device") or next((x for x in args[1:] if isinstance(x, torch.device)), None)
        if where is None:
            return func(*args, **kwargs)
        args = ["cpu" if isinstance(x, torch.device) else x for x in args]
        result = func(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})
        with torch._C.DisableTorchFunctionSubclass():
            return result.as_subclass(OnCuda if torch.device(where) == CUDA else torch.Tensor)


@pytest.mark.parametrize("offload", [False, True])
def test_scores_stay_on_the_accelerator_or_go_to_host_memory(
    trainer: PurifiedOPSDTrainer, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trainer.scoring_callback.score(PROMPTS, COMPLETIONS).hidden
    trainer.args.offload_scores = offload
    monkeypatch.setattr(trainer.accelerator.state, "device", CUDA)
    with PlayedCuda():
        scores = trainer.scoring_callback.score(PROMPTS, COMPLETIONS)
        devices = {name: states.device.type for name, states in scores.hidden.items()}
        assert scores.completion_mask.device.type == ("cpu" if offload else "cuda")
    assert devices == dict.fromkeys(PROMPTS, "cpu" if offload else "cuda")
    for name, states in scores.hidden.items():  # the same operations on the same shapes
        assert torch.equal(states.as_subclass(torch.Tensor), expected[name])


# Prefixes shared by teacher and reference-only probe -----------------------------------------------------------------


def _ids(count: int, seed: int) -> list[int]:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _sharing_prompts() -> dict[str, list[list[int]]]:
    """Ragged rows: a long prefix, a longer one, none at all, two prompts that are the same, the first prefix again."""
    references = [_ids(280, 1), _ids(347, 2), _ids(270, 3), _ids(261, 4), _ids(280, 1)]
    question, ending = _ids(9, 5), [70, 71]
    teacher = [reference + question + ending for reference in references]
    reference_only = [reference + ending for reference in references]
    teacher[2] = question + teacher[2]
    teacher[3] = reference_only[3] = references[3]
    return {"base": [_ids(n, 6) for n in (5, 9, 3, 200, 5)], "teacher": teacher, "reference_only": reference_only}


SHARING = _sharing_prompts()
WRITTEN = [_ids(n, 7 + n) for n in (12, 5, 20, 1, 2)]
# Window attention in every other layer, with windows shorter and longer than the continuation
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "granite": ("granite", {}),  # Llama's layers
    "gemma2": ("gemma2", {"sliding_window": 16}),
    "gemma2 long": ("gemma2", {"sliding_window": 100}),
}


@pytest.mark.parametrize(("most", "padding_free"), [(1, "false"), (4, "false"), (4, "true"), (10, "true")])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_continued_prefixes_score_what_separate_forwards_do(
    name: str,
    attention: str,
    most: int,
    padding_free: str,
    make_model: Callable[..., PreTrainedModel],
    tokenizer: Any,
    conversational_dataset: Dataset,
    arguments: dict[str, Any],
) -> None:
    architecture, overrides = MODELS[name]
    # logits of a few nats: an argument of softmax beyond ten would amplify the rounding of both ways
    model = make_model(architecture, initializer_range=0.15, **overrides)
    model.set_attn_implementation(attention)
    oracle = copy.deepcopy(model).double()
    trainer = build_trainer(
        model,
        tokenizer,
        conversational_dataset,
        arguments,
        lora=most == 4,
        scoring_batch_size=most,
        padding_free=padding_free,
    )
    shared = trainer.scoring_callback.score(SHARING, WRITTEN)
    trainer.args.share_reference_prefix = False
    apart = trainer.scoring_callback.score(SHARING, WRITTEN)
    saved = 2 * 280 + 347 + 260 + (280 if most == 10 else 0)  # rows 0 and 4 in one batch, or not
    assert apart.stats.tokens - shared.stats.tokens == saved
    assert apart.stats.tokens == sum(
        len(prompt) + len(written) for rows in SHARING.values() for prompt, written in zip(rows, WRITTEN, strict=True)
    )
    for context, prompts in SHARING.items():
        for row, (prompt, written) in enumerate(zip(prompts, WRITTEN, strict=True)):
            with torch.no_grad():
                states = oracle.base_model(input_ids=torch.tensor([prompt + written])).last_hidden_state[0]
            expected = states[len(prompt) - 1 : -1]
            found, before = (scores.hidden[context][row] for scores in (shared, apart))
            assert not found[len(written) :].any()
            for states in (found, before):
                assert (states[: len(written)] - expected).norm() <= 1e-5 * expected.norm(), (context, row)


def test_a_shared_prefix_takes_one_forward_more(
    make_model: Callable[..., PreTrainedModel],
    tokenizer: Any,
    conversational_dataset: Dataset,
    arguments: dict[str, Any],
) -> None:
    trainer = build_trainer(
        make_model(), tokenizer, conversational_dataset, arguments, scoring_batch_size=100, padding_free="false"
    )
    calls = []
    trainer.model.base_model.model.base_model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    scores = trainer.scoring_callback.score(SHARING, WRITTEN)
    # the prefixes of four rows, two of them the same; what continues them; the base's five, two of the row without
    assert [shape[0] for shape in calls] == [3, 8, 7] and calls[0][1] == 347
    assert scores.stats.forwards == 3
    assert scores.stats.padded_tokens == sum(rows * columns for rows, columns in calls)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_step_is_the_same_with_and_without_shared_prefixes(
    lora: bool,
    make_model: Callable[..., PreTrainedModel],
    tokenizer: Any,
    conversational_dataset: Dataset,
    arguments: dict[str, Any],
) -> None:
    dataset = conversational_dataset.map(
        lambda row, i: {"reference": row["reference"] + "so " * (100 + i)}, with_indices=True
    )
    results = []
    for share in (True, False):
        trainer = build_trainer(
            make_model(initializer_range=0.15),
            tokenizer,
            dataset,
            {**arguments, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0},
            lora=lora,
            teacher_prompt_template=REFERENCE_FIRST_TEACHER_PROMPT_TEMPLATE,
            share_reference_prefix=share,
            gradient_checkpointing=True,
        )
        counts = []
        score = trainer.scoring_callback.score

        def counted(*args: Any, score: Any = score, counts: list[int] = counts) -> Any:
            scores = score(*args)
            counts.append(scores.stats.tokens)
            return scores

        trainer.scoring_callback.score = counted
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        loss = trainer.train().training_loss
        step = torch.cat(
            [(p.detach() - before[n]).flatten() for n, p in trainer.model.named_parameters() if n in before]
        )
        results.append((loss, step, sum(counts)))
    (loss, step, tokens), (plain_loss, plain_step, plain_tokens) = results
    assert tokens < plain_tokens - 2 * 300
    # the divergence is quadratic in what the contexts change, little here, so it amplifies rounding
    assert abs(loss - plain_loss) <= 1e-4 * plain_loss and plain_step.norm() > 0
    assert (step - plain_step).norm() <= 1e-4 * plain_step.norm()


UNSHAREABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64},
                **{"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0},
            },
        },
    ),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "chunked": ("llama4_text", {"attention_chunk_size": 32}),
    "hybrid": ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}),
    "state space": ("mamba2", {"num_heads": 4, "head_dim": 16, "expand": 2}),
}


@pytest.mark.parametrize("name", UNSHAREABLE)
def test_models_that_cannot_continue_a_prefix_are_told_apart(name: str) -> None:
    architecture, fields = UNSHAREABLE[name]
    config = AutoConfig.for_model(
        architecture,
        **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, **fields},
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert config.model_type in str(why_not_shareable(model))


def test_a_model_that_cannot_continue_a_prefix_is_scored_apart_and_says_so_once(
    make_model: Callable[..., PreTrainedModel],
    tokenizer: Any,
    conversational_dataset: Dataset,
    arguments: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = make_model(rope_parameters=rope)
    trainer = build_trainer(model, tokenizer, conversational_dataset, arguments, padding_free=False)
    with caplog.at_level(logging.WARNING, logger="purified_opsd_trl.scoring"):
        trainer.scoring_callback.score(PROMPTS, COMPLETIONS)
        assert not caplog.messages  # nothing to share, nothing to say
        stats = [trainer.scoring_callback.score(SHARING, WRITTEN).stats for _ in range(2)]
    assert [message for message in caplog.messages if "begin alike" in message] == caplog.messages[:1]
    assert len(caplog.messages) == 1 and "qwen3" in caplog.text
    assert stats[0].tokens == sum(
        len(prompt) + len(written) for rows in SHARING.values() for prompt, written in zip(rows, WRITTEN, strict=True)
    )
