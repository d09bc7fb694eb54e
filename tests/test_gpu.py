"""
The trainer's numbers and memory on a GPU. Every test has a twin on the CPU, at a smaller size, that the suite runs.

`make gpu` and `pytest -m gpu` run the GPU's side; the row kernels are in `test_kernels.py`.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer
from purified_opsd_trl.bench.measure import PeakMemory
from purified_opsd_trl.head import LMHead
from purified_opsd_trl.kernels.settings import LossSettings
from purified_opsd_trl.loss import FrozenStates, token_loss
from purified_opsd_trl.offload import HostCopies
from tests import reference


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]}
MIB = 2**20


@pytest.fixture(autouse=True)
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def sums(first: range) -> Dataset:
    """Additions with a worked solution."""
    rows = [(f"What is {a} + {b}?", f"{a} + {b} = {a + b}. The answer is {a + b}.") for a in first for b in range(10)]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": q}], "reference": r} for q, r in rows])


@pytest.fixture
def build(
    make_model: Callable[..., Any], tokenizer: Any, arguments: dict[str, Any]
) -> Callable[..., PurifiedOPSDTrainer]:
    """Factory of trainers on a device, with gradient checkpointing."""

    def make(device: str, dtype: torch.dtype, lora: bool, data: Dataset | None = None, **fields: Any) -> Any:
        fields = {"use_cpu": device == "cpu", "bf16": dtype == torch.bfloat16, **fields}
        return PurifiedOPSDTrainer(
            model=make_model(vocab_size=fields.pop("vocab_size", 274)).to(dtype),
            args=PurifiedOPSDConfig(**{**arguments, "gradient_checkpointing": True, **fields}),
            train_dataset=data or sums(range(2)),
            eval_dataset=sums(range(24, 26)),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA) if lora else None,
        )

    return make


def by_hand(
    trainer: PurifiedOPSDTrainer, frozen: Any, rows: list[Any], completions: list[list[int]], dtype: torch.dtype
) -> torch.Tensor:
    """All gradients of one batch, in one vector, from token ids: forwards in `dtype`, dense softmaxes in fp64."""
    device = trainer.accelerator.device
    student, frozen = (copy.deepcopy(m).to(device, dtype).eval() for m in (trainer.model, frozen))
    student.gradient_checkpointing_disable()
    count = sum(map(len, completions))
    for row, completion in zip(rows, completions, strict=True):
        contexts = trainer.build_contexts(row)

        def logits(model: Any, prompt: Any, completion: list[int] = completion) -> torch.Tensor:
            text = trainer.processing_class.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            ids = trainer.processing_class(text, add_special_tokens=False)["input_ids"]
            output = model(input_ids=torch.tensor([ids + completion], device=device))
            return output.logits[0, len(ids) - 1 : -1]

        with torch.no_grad():
            prompts = (contexts.base, contexts.teacher, contexts.reference_only)
            scored = [logits(frozen, prompt) for prompt in prompts]
        weights = torch.full((len(completion),), 1.0 / count, device=device)
        reference.objective(logits(student, contexts.base), *scored, weights).loss.backward()
    return flat(student)


def flat(model: torch.nn.Module) -> torch.Tensor:
    """All gradients in one fp64 vector."""
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_training_step_equals_the_computation_by_hand(
    build: Callable[..., PurifiedOPSDTrainer], make_model: Callable[..., Any], device: str, dtype: Any, lora: bool
) -> None:
    trainer = build(device, dtype, lora, per_device_train_batch_size=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the base, as training would
        for parameter in (p for p in trainer.model.parameters() if p.requires_grad):
            parameter.add_((0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter))
    rows = [trainer.train_dataset[i] for i in range(4)]
    completions = [torch.randint(97, 123, (n,), generator=generator).tolist() for n in (7, 3, 8, 1)]
    trainer._generate_single_turn = lambda *_, **__: completions  # type: ignore[method-assign]
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = trainer.training_step(trainer.model, rows, None)
    assert loss.device.type == device and torch.isfinite(loss)

    initial = make_model().to(dtype)
    exact = by_hand(trainer, initial, rows, completions, torch.float64)
    # In half precision the layers round as well: no rule says how much, but dense autograd in the same dtype does
    rounded = by_hand(trainer, initial, rows, completions, dtype)
    ours, theirs = ((x - exact).norm() / exact.norm() for x in (flat(trainer.model), rounded))
    assert ours <= (1e-4 if dtype == torch.float32 else 1.5 * theirs), (ours, theirs)
    assert theirs < 0.5  # else the comparison would say nothing


@on_both
def test_learning_lowers_the_held_out_divergence(build: Callable[..., PurifiedOPSDTrainer], device: str) -> None:
    on_gpu = device == "cuda"
    trainer = build(
        device,
        torch.float32,
        lora=True,
        data=sums(range(24)),
        bf16=on_gpu,  # autocast
        max_steps=30 if on_gpu else 10,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=20,
    )
    trainer.evaluate()
    before = trainer.state.log_history[-1]
    trainer.train()
    trainer.evaluate()
    after = trainer.state.log_history[-1]
    for metric in ("eval_loss", "eval_purification/kl_target_student"):
        assert after[metric] < (0.8 if on_gpu else 0.95) * before[metric], metric


@on_both
def test_loss_memory_keeps_to_its_budget(device: str) -> None:
    on_gpu = device == "cuda"
    tokens, hidden, vocab, budget = (8192, 256, 151936, 512) if on_gpu else (512, 64, 32768, 32)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    states = [torch.randn(tokens, hidden, device=device, dtype=dtype) for _ in range(3)]
    head = LMHead(torch.randn(vocab, hidden, device=device, dtype=dtype) / 8)
    student, weights = states[0].requires_grad_(), torch.full((tokens,), 1 / tokens, device=device)
    settings = LossSettings(loss_memory_budget=budget)
    frozen = FrozenStates(base=states[1], delta=states[2])

    def step(count: int) -> None:
        part = FrozenStates(base=frozen.base[:count], delta=frozen.delta[:count])  # type: ignore[index]
        token_loss(student[:count], head, part, head, weights[:count], settings).loss.backward()

    step(8)  # kernels, libraries and their workspaces are there before the clock starts
    with PeakMemory(torch.device(device)) as memory:
        step(tokens)
    if memory.bytes is None:
        pytest.skip("no high-water mark of resident memory here")
    # Not scratch: gradients of the states (fp32, in their dtype, and padded to [N, H] by the slice); on a CPU 12 MiB
    # for the blocks of the row transform, and what the allocator rounds up
    gradients = 12 * tokens * hidden
    assert memory.bytes <= (budget + 16) * MIB + gradients
    if device == "cuda":  # on the CPU the allocator may give back what earlier tests have freed
        assert memory.bytes >= budget * MIB / 4  # it was measured
    assert memory.bytes < 4 * tokens * vocab  # one dense tensor of logits


@on_both
def test_scoring_memory_follows_the_token_budget(build: Callable[..., PurifiedOPSDTrainer], device: str) -> None:
    vocab, budget = (151936, 4096) if device == "cuda" else (16384, 2048)
    trainer = build(device, torch.float32, True, vocab_size=vocab, scoring_batch_size=64, scoring_token_budget=budget)

    def peak(rows: int) -> int:
        prompts = {name: [[65] * 128] * rows for name in ("base", "teacher", "reference_only")}
        with PeakMemory(trainer.accelerator.device) as memory:
            scores = trainer.scoring_callback.score(prompts, [[97] * 128] * rows)
        if memory.bytes is None:
            pytest.skip("no high-water mark of resident memory here")
        return memory.bytes - sum(states.nbytes for states in scores.hidden.values())

    peak(8)
    few, many = peak(16), peak(64)
    # No logits are formed, and four times the rows take no more than their kept states
    assert many < 4 * budget * vocab / 2
    if device == "cuda":  # a CPU's allocator gives back when it likes
        assert many <= 1.1 * few + MIB


@on_both
def test_offloaded_states_are_copied_beside_computation(
    build: Callable[..., PurifiedOPSDTrainer], device: str
) -> None:
    copies, shape = HostCopies(torch.device(device)), (2048, 512)
    kept = [copies.zeros(*shape, dtype=torch.float32) for _ in range(8)]
    for i, out in enumerate(kept):  # each source is freed at once, and its memory taken by the next
        copies.to_host(torch.full(shape, float(i), device=device), out)
    copies.wait()
    assert [out.unique().tolist() for out in kept] == [[float(i)] for i in range(8)]
    if device == "cuda":
        assert all(out.is_pinned() for out in kept)
        torch.cuda._sleep(2 * 10**9)  # about a second of computation
        arriving = [copies.to_device(out) for out in kept]
        copies.wait()
        assert not torch.cuda.current_stream().query()  # all is there, and the computation still runs
        assert [get().unique().tolist() for get in arriving] == [[float(i)] for i in range(8)]

    gradients = []
    for offload in (False, True):
        trainer = build(device, torch.float32, True, offload_scores=offload, train_token_budget=200)
        trainer._generate_single_turn = lambda ids, *_, **__: [[97 + len(one) % 7] * 8 for one in ids]  # type: ignore
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        trainer.training_step(trainer.model, [trainer.train_dataset[i] for i in range(4)], None)
        gradients.append(flat(trainer.model))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)
