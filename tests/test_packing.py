"""Packed rows, parts of a micro-batch and chunks against separate forwards, padding and whole micro-batches."""

import copy
import itertools
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from purified_opsd_trl import PurifiedOPSDTrainer
from purified_opsd_trl.backbone import packed_hidden_states, packing_is_exact, why_not_packable
from purified_opsd_trl.collator import MIN_SHARED_TOKENS, PurificationCollator
from purified_opsd_trl.monitoring.metrics import training_metrics
from purified_opsd_trl.packing import Forward, Packing, arrange
from purified_opsd_trl.parts import loss_mask, take_part, with_more_forwards
from tests.trainer_cases import WAYS, Build, first_rows, fixed_rollout, move_student, one_step


MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
# Windows shorter than the sequences, experts, compressed keys and values, sinks, softcapping, absolute positions
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "llama": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "decoder_sparse_step": 1, **MOE},
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **MLA, **MOE},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "sliding_window": 6, "num_experts_per_tok": 2},
    "olmo3": {"sliding_window": 6},
    "gpt2": {},
}
LEAKING: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {"alibi": True, "new_decoder_architecture": False},
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("conv", {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": ("linear_attention", {"layer_types": ["linear_attention", "full_attention"]}),
    "mamba2": ("takes no positions", {"num_heads": 4, "head_dim": 16, "expand": 2}),
}


def tiny(name: str, fields: dict[str, Any], attention: str | None = "eager") -> PreTrainedModel:
    config = AutoConfig.for_model(
        name,
        **{
            **{"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128},
            **{"pad_token_id": 0, "initializer_range": 0.3, **fields},
        },
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def sequences(lengths: tuple[int, ...], vocab: int = 100) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, vocab, (length,), generator=generator) for length in lengths]


def in_one_row(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat(parts)[None], torch.cat([torch.arange(len(part)) for part in parts])[None]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_gives_the_states_and_gradients_of_separate_forwards(family: str, attention: str) -> None:
    if family == "gpt_oss" and attention == "sdpa":
        pytest.skip("gpt-oss has no sdpa")
    model = tiny(family, FAMILIES[family], attention)
    assert why_not_packable(model) is None and packing_is_exact(model, torch.device("cpu"))
    parts = sequences((11, 5, 17, 1))
    packed = packed_hidden_states(model, *in_one_row(parts))[0]
    alone = torch.cat([model.base_model(input_ids=part[None], use_cache=False).last_hidden_state[0] for part in parts])
    assert (packed - alone).norm() <= 2e-6 * alone.norm()
    weights = [p for p in model.base_model.parameters() if p.requires_grad]
    direction = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1))
    found, expected = (
        torch.autograd.grad((states * direction).sum(), weights, allow_unused=True) for states in (packed, alone)
    )
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).norm() <= 2e-5 * other.norm() + 1e-6


def test_flex_attention_gives_the_states_of_separate_forwards() -> None:
    model = tiny("qwen3", FAMILIES["qwen3"], "flex_attention")
    parts = sequences((11, 5, 17, 1))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling for a CPU takes a minute
        packed = packed_hidden_states(model, *in_one_row(parts))[0]
        eager = tiny("qwen3", FAMILIES["qwen3"], "eager").base_model
        alone = torch.cat([eager(input_ids=part[None], use_cache=False).last_hidden_state[0] for part in parts])
    assert (packed - alone).norm() <= 2e-6 * alone.norm()
    assert not Packing.of_model(model.config, by_cost=True).by_cost  # it always pays


@pytest.mark.parametrize("family", LEAKING)
def test_code_that_lets_sequences_see_each_other_is_found_out(family: str) -> None:
    model = tiny(family, LEAKING[family])
    assert why_not_packable(model) is None  # nothing in the configuration tells
    assert not packing_is_exact(model, torch.device("cpu"))


@pytest.mark.parametrize("family", OTHERS)
def test_layers_that_cannot_be_packed_are_named(family: str) -> None:
    named, fields = OTHERS[family]
    with torch.device("meta"):
        reason = str(why_not_packable(tiny(family, fields, None)))
    assert named in reason and family in reason


# Plans ---------------------------------------------------------------------------------------------------------------


def qwen3(by_cost: bool, attention: str = "sdpa") -> Packing:
    config = tiny("qwen3", FAMILIES["qwen3"], "sdpa").config
    config._attn_implementation = attention
    return Packing.of_model(config, by_cost)


@pytest.mark.parametrize("lengths", [(200, 100, 130), (90, 90), (128,)])
@pytest.mark.parametrize("packed", [True, False])
def test_counted_flops_are_those_that_run(lengths: tuple[int, ...], packed: bool) -> None:
    model = tiny("qwen3", {**FAMILIES["qwen3"], "max_position_embeddings": 512})
    parts = sequences(lengths)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if packed:
            packed_hidden_states(model, *in_one_row(parts))
        else:
            model.base_model(input_ids=torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), use_cache=False)
    tokens = sum(lengths) if packed else max(lengths) * len(lengths)
    masked = len(lengths) > 1 if packed else len(set(lengths)) > 1
    packing = qwen3(by_cost=True)
    # `eager` forms the scores of all pairs, also where `sdpa` would skip those above the diagonal
    halved = 0 if masked else packing.per_pair * (tokens * max(lengths)) / 2
    rotary = counter.get_total_flops() % 1024  # frequencies times positions: not of a layer
    assert packing.flops(lengths, packed) + halved == pytest.approx(counter.get_total_flops() - rotary, rel=2e-3)


LENGTHS = (300, 20, 40, 280, 60, 25, 90, 31)


@pytest.mark.parametrize("budget", [None, 100, 320, 700])
@pytest.mark.parametrize("packing", [qwen3(False), qwen3(True), qwen3(True, "flash_attention_2"), None])
def test_every_sequence_has_one_forward_within_the_budget(packing: Packing | None, budget: int | None) -> None:
    forwards = arrange(LENGTHS, 4, budget, packing)
    assert sorted(i for one in forwards for i in one.indices) == list(range(len(LENGTHS)))
    for one in forwards:
        own = [LENGTHS[i] for i in one.indices]
        tokens = sum(own) if one.packed else len(own) * max(own)
        assert len(own) == 1 or tokens <= (budget or 4 * 300)
        assert one.packed or len(own) <= 4
    assert 300 in {LENGTHS[i] for i in forwards[0].indices}
    if packing is not None and not packing.by_cost:
        assert all(one.packed for one in forwards)


def test_by_cost_packs_ragged_lengths_and_pads_equal_ones() -> None:
    assert any(one.packed for one in arrange(LENGTHS, 8, None, qwen3(True)))
    assert not any(one.packed for one in arrange((100,) * 8, 8, None, qwen3(True)))
    assert qwen3(True, "flash_attention_2") == qwen3(False, "flash_attention_2")  # it always pays


def test_forwards_are_split_down_to_rows() -> None:
    forwards = [Forward((0, 1, 2), True), Forward((3,))]
    split, missing = with_more_forwards(forwards, 1)
    assert [one.indices for one in split] == [(0, 1), (2,), (3,)] and split[1].packed and missing == 0
    split, missing = with_more_forwards(forwards, 5)
    assert [one.indices for one in split] == [(0,), (1,), (2,), (3,)] and missing == 3


# Training ------------------------------------------------------------------------------------------------------------


class ToolUser(PurifiedOPSDTrainer):
    """Every third token is the result of a tool."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"].clone()
        mask[:, ::3] = 0
        return {**output, "tool_mask": mask, "num_items_in_batch": (mask * output["completion_mask"]).sum()}


class OwnTarget(PurifiedOPSDTrainer):
    def target_logits(self, teacher, reference_only, base):
        return (teacher + base) / 2


INTRODUCTION = "x" * MIN_SHARED_TOKENS  # the prompts of teacher and probe begin alike, and it is run once
SCENARIOS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "decomposition": {"decomposition_steps": 1, "decomposition_max_tokens": 7},
    "checkpointing": {"gradient_checkpointing": True, "lora": True, "loss_type": "sampled_token"},
    "tools": {"trainer_class": ToolUser, "decomposition_steps": 0},
    "own target": {"trainer_class": OwnTarget},
    "truncated": {"mask_truncated_completions": True, "decomposition_steps": 0},
    "multiple": {"pad_to_multiple_of": 16, "architecture": "gemma2", "model_kwargs": {"sliding_window": 16}},
    "prefix": {"teacher_prompt_template": INTRODUCTION + "{question}{reference}", "decomposition_steps": 0}
    | {"reference_prompt_template": INTRODUCTION + "{reference}", "model_kwargs": {"max_position_embeddings": 1024}},
    "automatic": {"scoring_token_budget": 200, "padding_free": "auto"},
}
KEPT = ("purification/", "loss", "entropy", "num_tokens", "grad_norm", "epistemic/", "completions/", "eval_")


def run(build: Build, scenario: str, way: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:  # noqa: F811
    """What is logged in one step and an evaluation, and what the step did to the weights."""
    trainer = build(
        **{
            **{"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "shuffle_dataset": False},
            **{"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "model_kwargs": {}},
            **WAYS[way],
            **SCENARIOS[scenario],
        }
    )
    trainer.eval_dataset = trainer.train_dataset.select(range(5))
    fixed_rollout(trainer)
    written = trainer._generate_single_turn
    trainer._generate_single_turn = lambda *args: [ids + [260] * (len(ids) % 2) for ids in written(*args)]  # some end
    move_student(trainer)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    batches, shared = trainer.scoring_batches, []

    def noted(*args: Any, **kwargs: Any) -> Any:
        made = batches(*args, **kwargs)
        shared.extend(batch.prefix_ids is not None for batch in made)
        return made

    trainer.scoring_batches = noted
    trainer.train()
    assert any(shared) == (scenario == "prefix")
    logs = {**trainer.state.log_history[0], **trainer.evaluate()}
    kept = {name: value for name, value in logs.items() if name.startswith(KEPT) and "time" not in name}
    kept = {name: value for name, value in kept.items() if "second" not in name and "padding" not in name}
    return kept, {n: p.detach() - before[n] for n, p in trainer.model.named_parameters() if n in before}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_way_gives_the_losses_gradients_and_metrics_of_padding(build: Build, scenario: str) -> None:  # noqa: F811
    expected, step = run(build, scenario, "padded")
    scale = max(change.norm() for change in step.values())
    assert abs(expected["eval_loss"]) > 1e-4 and abs(expected["loss"]) > 1e-4 and scale > 0
    for way in ("packed", "padded parts", "packed parts"):
        found, changes = run(build, scenario, way)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (way, name)
        for name, change in step.items():
            assert (changes[name] - change).norm() <= 1e-5 * scale, (way, name)


def test_the_budget_bounds_what_the_student_runs_at_once(build: Build) -> None:  # noqa: F811
    ran: dict[str, list[int]] = {}
    for way in WAYS:
        trainer = build(per_device_train_batch_size=4, **WAYS[way])
        fixed_rollout(trainer)
        body, sizes = trainer.model.base_model, ran.setdefault(way, [])
        body.register_forward_hook(
            lambda module, args, kwargs, output, sizes=sizes: (
                sizes.append(kwargs["input_ids"].numel()) if module.training else None
            ),
            with_kwargs=True,
        )
        one_step(trainer, first_rows(trainer, 4))
    assert [len(ran[way]) for way in WAYS] == [1, 1, 3, 3]
    assert max(ran["packed parts"]) <= 150 and sum(ran["packed parts"]) == ran["packed"][0] < ran["padded"][0]


def test_a_repeated_part_adds_nothing(build: Build) -> None:  # noqa: F811
    trainer = build(**WAYS["packed"], decomposition_steps=1)
    fixed_rollout(trainer)
    trainer.decomposition_monitor.due = True
    inputs = trainer._generate_and_score_completions(first_rows(trainer, 2))
    part = take_part(inputs, Forward((1,), packed=True), counts=False)
    loss, entropy, tokens = trainer._compute_loss(trainer.model.train(), part, None)
    assert (loss.item(), entropy.item(), tokens.item()) == (0.0, 0.0, 0)
    loss.backward()
    assert not any(p.grad.any() for p in trainer.model.parameters() if p.grad is not None)
    assert not trainer.decomposition_monitor.tokens


def test_truncated_completions_carry_no_loss_only_if_asked(build: Build) -> None:  # noqa: F811
    written = {True: [97, 98, 99, 260], False: [97, 98, 99, 100, 101]}  # 260 ends a turn
    counts = []
    for masked in (False, True):
        trainer = build(mask_truncated_completions=masked)
        trainer._generate_single_turn = lambda ids, *_, **__: [written[i % 2 == 0] for i in range(len(ids))]
        output = trainer._generate_and_score_completions(first_rows(trainer, 4))
        counts.append(loss_mask(output).sum(dim=1).tolist())
        assert output["num_items_in_batch"] == sum(counts[-1])
        assert output["completion_mask"].sum(dim=1).tolist() == [4, 5, 4, 5]
    assert counts == [[4, 5, 4, 5], [4, 0, 4, 0]]


def test_a_model_that_cannot_pack_is_padded_and_says_so_once(
    build: Build,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("opt", vocab_size=274, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with caplog.at_level(logging.WARNING, logger="purified_opsd_trl.accumulating"):
        build(trainer_kwargs={"model": model}, padding_free=True).train()
    assert [message for message in caplog.messages if "padded, not packed: opt" in message] == caplog.messages[-1:]


def test_speed_is_tokens_over_seconds_and_mfu_follows_the_palm_convention(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("llama", {}).config
    on_cpu: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=2, mixed_precision="bf16")
    assert training_metrics(600.0, 4, 2.0, config, on_cpu) == {"training/tokens_per_second": (600.0, 2.0)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    on_h100: Any = SimpleNamespace(device=torch.device("cuda"), num_processes=2, mixed_precision="bf16")
    total, seconds = training_metrics(600.0, 4, 2.0, config, on_h100)["training/mfu"]
    # per layer: four square projections, three of the feed-forward part, scores and values over 150 tokens; the head
    forward = 2 * (2 * 4 * 32 * 32 + 2 * 3 * 32 * 64 + 2 * 2 * 32 * 150) + 2 * 32 * 100
    assert total / seconds == pytest.approx(100 * 3 * forward * (600 / 2) / (2 * 989e12))


# Chunks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("budget", [7, 16, 33])
def test_chunks_score_what_one_forward_does(build: Build, name: str, budget: int) -> None:  # noqa: F811
    fields = {**FAMILIES[name], "vocab_size": 274, "max_position_embeddings": 512}
    model = tiny(name, fields)
    trainer = build(trainer_kwargs={"model": copy.deepcopy(model)}, scoring_token_budget=budget, scoring_batch_size=3)
    prompts, completions = sequences((9, 30, 2), 270), sequences((40, 1, 3), 270)
    ids = [[*p.tolist()] for p in prompts], [[*c.tolist()] for c in completions]
    scores = trainer.scoring_callback.score({"base": ids[0]}, ids[1])
    assert scores.stats.forwards >= -(-49 // budget) + 1
    for row, (prompt, completion) in enumerate(zip(*ids, strict=True)):
        with torch.no_grad():
            states = model.base_model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
        expected = states[len(prompt) - 1 : -1]
        assert (scores.hidden["base"][row, : len(completion)] - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("packing", [None, qwen3(False)])
def test_processes_agree_on_chunks(packing: Packing | None) -> None:
    prompts = {"base": [[1] * 30, [2] * 2], "teacher": [[1] * 45, [2] * 9]}
    completions = [[3] * 20, [4] * 3]
    collator = PurificationCollator(0, max_sequences=2, max_tokens=20)
    own = sum(b.forwards for b in collator.scoring_batches(prompts, completions, packing=packing, chunk=True))
    for wanted, rows in itertools.product(range(own + 6), ([0, 1], [0])):
        of_rows = {context: [ids[row] for row in rows] for context, ids in prompts.items()}
        agree: Callable[[int], int] = lambda count, wanted=wanted: max(count, wanted)  # noqa: E731
        batches = collator.scoring_batches(
            of_rows, [completions[row] for row in rows], agree=agree, packing=packing, chunk=True
        )
        least = sum(
            b.forwards
            for b in collator.scoring_batches(of_rows, [completions[r] for r in rows], packing=packing, chunk=True)
        )
        assert sum(batch.forwards for batch in batches) == max(least, wanted)
        assert {key for b in batches for key in zip(b.contexts, b.rows, strict=True)} == {
            (context, row) for context in prompts for row in range(len(rows))
        }


def test_scores_of_a_dataset_pack_or_pad_by_cost(build: Build, conversational_dataset: Dataset) -> None:  # noqa: F811
    ratios = []
    for padding_free in ("false", "auto"):
        trainer = build(padding_free=padding_free, per_device_train_batch_size=8)
        fixed_rollout(trainer)
        one_step(trainer, first_rows(trainer, 8))
        ratios.append(trainer._token_means["train"].flush()["training/padding_ratio"])
    assert ratios[0] > 1.3 and 1.0 <= ratios[1] < ratios[0]
