"""
The row transforms and their Triton twin, and the matrix products, against the fp64 oracle.

Run as a script, this file compares the twins in Triton's CPU interpreter, which has to be chosen before Triton is
imported; `test_triton_twin_interpreted` starts it. The tests marked `gpu` run the compiled kernels.
"""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from purified_opsd_trl import head as lm_head
from purified_opsd_trl.head import LOG2E, LMHead
from purified_opsd_trl.kernels import fused, rows
from purified_opsd_trl.kernels.rows import RowStats
from purified_opsd_trl.kernels.settings import LossSettings
from purified_opsd_trl.loss import FrozenStates, token_loss
from tests import reference


STATS = [field.name for field in fields(RowStats)]


def stats_of(tokens: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> RowStats:
    return RowStats(*(torch.full((tokens,), math.nan, dtype=dtype, device=device) for _ in STATS))


def logits_of(tokens: int, vocab: int, std: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, base, teacher and reference-only logits `[n, V]`, natural, fp64."""
    generator = torch.Generator().manual_seed(seed)
    student, base, teacher, probe = torch.randn(4, tokens, vocab, generator=generator, dtype=torch.float64) * std
    return student, base, teacher, probe


def used(logits: Tensor) -> int:
    """Ids that a tokenizer would have: the last tenth of the vocabulary is unused."""
    return logits.shape[1] * 9 // 10


def transform(
    function: Callable[..., None],
    logits: tuple[Tensor, Tensor, Tensor, Tensor],
    settings: LossSettings,
    *,
    plain: bool = False,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> tuple[RowStats, Tensor]:
    """Statistics and gradient `[n, V]` of one of the twins."""
    student, base, teacher, probe = ((x * LOG2E).to(device, dtype) for x in logits)
    delta = teacher - probe
    stats = stats_of(len(student), dtype, device)
    grad = student if grad_dtype is None else torch.empty_like(student, dtype=grad_dtype)
    if plain:
        function(student, teacher, None, None, settings, stats, grad, used(student))
    else:
        function(student, base, delta, delta.mean(-1), settings, stats, grad, used(student))
    return stats, grad.double() * settings.grad_scale


def oracle(logits: tuple[Tensor, Tensor, Tensor, Tensor], settings: LossSettings, plain: bool) -> reference.Result:
    student, base, teacher, probe = logits
    return reference.evaluate(
        student,
        base,
        teacher,
        probe,
        torch.ones(len(student)),
        target="teacher" if plain else "purified",
        beta=settings.beta,
        pmi_beta=settings.pmi_beta,
        pmi_clip=settings.pmi_clip,
        kl_clip=settings.kl_clip,
        used_vocab=used(student),
    )


def compare(stats: RowStats, grad: Tensor, expected: reference.Result, *, plain: bool, tolerance: float) -> None:
    names = [*STATS[:4], STATS[6]] if plain else STATS
    for name in names:
        wanted = getattr(expected, name)
        if wanted is not None:
            value = getattr(stats, name).double().cpu()
            torch.testing.assert_close(
                value, wanted, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert expected.grad_logits is not None
    error = (grad.cpu() - expected.grad_logits).norm() / expected.grad_logits.norm()
    assert error <= tolerance


# The torch transform -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [17, 1000, 32003])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("kl_clip", [None, 0.01])
def test_rows(vocab: int, beta: float, kl_clip: float | None) -> None:
    logits = logits_of(3, vocab, 3.0)
    for pmi_clip, plain in ((None, False), (0.5, False), (10.0, False), (10.0, True)):
        settings = LossSettings(beta=beta, pmi_beta=1.3, pmi_clip=pmi_clip, kl_clip=kl_clip)
        expected = oracle(logits, settings, plain)
        compare(*transform(rows.divergence_rows, logits, settings, plain=plain), expected, plain=plain, tolerance=5e-6)
    exact = transform(rows.divergence_rows, logits, settings, plain=True, dtype=torch.float64)
    compare(*exact, expected, plain=True, tolerance=1e-12)


def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rows go through together makes no difference but rounding, and none at all from call to call."""
    logits, settings = logits_of(7, 100, 3.0), LossSettings(beta=0.5)
    expected = oracle(logits, settings, False)
    for block in (1, 300, 699, 700):  # 1, 3, 6 and 7 rows at a time
        monkeypatch.setattr(rows, "_CPU_BLOCK", block)
        # A processor may add up another shape in another order. 100 terms whose absolute values sum to at most 10 move
        # by at most 100 * 2^-53 * 10 = 1e-13, and a statistic is made of fewer than ten sums. fp32: as in `test_rows`.
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
            stats, grad = transform(rows.divergence_rows, logits, settings, dtype=dtype)
            compare(stats, grad, expected, plain=False, tolerance=tolerance)
            again, again_grad = transform(rows.divergence_rows, logits, settings, dtype=dtype)
            assert torch.equal(again_grad, grad)
            assert all(torch.equal(getattr(again, name), getattr(stats, name)) for name in STATS)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("offset", [-1e4, -70.0, 0.0, 70.0, 1e4])
def test_a_constant_added_to_the_logits_changes_nothing(beta: float, offset: float) -> None:
    logits = logits_of(2, 100, 3.0)
    settings = LossSettings(beta=beta)
    expected = oracle(logits, settings, False)
    moved = (logits[0] + offset, logits[1] - offset, logits[2] + offset, logits[3])
    tolerance = max(5e-6, 2e-6 * abs(offset))  # that of `test_rows`, or what fp32 logits of that size can hold
    compare(*transform(rows.divergence_rows, moved, settings), expected, plain=False, tolerance=tolerance)


def test_gradient_in_half_precision() -> None:
    logits, settings = logits_of(3, 1000, 3.0), LossSettings(beta=0.5)
    _, exact = transform(rows.divergence_rows, logits, settings)
    for dtype, bound in ((torch.bfloat16, 3e-3), (torch.float16, 4e-4)):
        _, rounded = transform(rows.divergence_rows, logits, settings, grad_dtype=dtype)
        assert (rounded - exact).norm() / exact.norm() <= bound


def test_gradient_is_optional() -> None:
    student, base, teacher, probe = (x.float() for x in logits_of(3, 100, 3.0))
    with_grad, _ = transform(rows.divergence_rows, logits_of(3, 100, 3.0), LossSettings(beta=0.5))
    stats = stats_of(3)
    student, base, delta = student * LOG2E, base * LOG2E, (teacher - probe) * LOG2E
    rows.divergence_rows(student, base, delta, delta.mean(-1), LossSettings(beta=0.5), stats, None)
    torch.testing.assert_close(stats.per_token, with_grad.per_token)


# The matrix products -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "_CONVERTED", 3 * 8)  # three rows of the head at a time
    generator = torch.Generator().manual_seed(0)
    hidden, grad = torch.randn(5, 8, generator=generator), torch.randn(5, 17, generator=generator)
    weight = torch.randn(17, 8, generator=generator).to(dtype)
    exact = weight.double()
    logits = torch.full((5, 17), math.nan)
    lm_head.project(hidden, weight, 0.7, logits)
    torch.testing.assert_close(logits.double(), 0.7 * hidden.double() @ exact.T, rtol=1e-5, atol=1e-6)
    back = torch.full((5, 8), math.nan)
    lm_head.back_to_hidden(grad, weight, 0.7, back)
    torch.testing.assert_close(back.double(), 0.7 * grad.double() @ exact, rtol=1e-5, atol=1e-6)
    total = torch.ones(17, 8)
    lm_head.add_to_weight(grad, hidden, 0.7, total)
    torch.testing.assert_close(total.double(), 1 + 0.7 * grad.double().T @ hidden.double(), rtol=1e-5, atol=1e-6)


def test_operand_dtype() -> None:
    half = torch.zeros(1, dtype=torch.bfloat16)
    assert lm_head.operand_dtype(half) == torch.float32  # a CPU gains nothing from rounding
    assert lm_head.operand_dtype(half.double()) == torch.float64


def test_half_precision_operands_convert_the_head_once() -> None:
    weight = torch.randn(17, 8)
    head = LMHead(weight)
    assert head.cast(torch.float32).weight is weight
    assert head.cast(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32])
def test_half_precision_path_of_an_accelerator(head_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU lacks the one operation that this path rests on, `addmm` with an fp32 result; here it is played."""
    addmm = torch.addmm

    def played(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if out_dtype is not None:
            assert a.dtype == b.dtype == torch.bfloat16 and total.dtype == out_dtype == torch.float32
        return addmm(total, a.to(total.dtype), b.to(total.dtype), **options)

    monkeypatch.setattr(torch, "addmm", played)
    monkeypatch.setattr(fused, "operand_dtype", lambda hidden: torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    hidden, base, delta = (torch.randn(7, 64, generator=generator).bfloat16() for _ in range(3))
    weight = (torch.randn(500, 64, generator=generator) / 3).bfloat16().to(head_dtype)
    leaf, head_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    states, weights = FrozenStates(base=base, delta=delta), torch.rand(7, generator=generator)
    result = token_loss(
        leaf, LMHead(head_weight), states, LMHead(weight), weights, LossSettings(loss_chunk_size=3, temperature=0.9)
    )
    result.loss.backward()
    head = reference.Head(weight)
    none = torch.zeros_like(delta)
    expected = reference.evaluate_hidden(hidden, head, base, delta, none, head, weights, temperature=0.9)
    torch.testing.assert_close(result.per_token.double(), expected.per_token, rtol=1e-4, atol=1e-5)
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16
    assert head_weight.grad is not None and head_weight.grad.dtype == head_dtype
    for ours, wanted in ((leaf.grad, expected.grad_hidden), (head_weight.grad, expected.grad_weight)):
        assert wanted is not None
        assert (ours.double() - wanted).norm() / wanted.norm() <= 1e-2


def test_device_chooses_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.row_transform(torch.device("cpu")) is rows.divergence_rows
    assert fused.row_transform(torch.device("meta")) is rows.divergence_rows
    monkeypatch.setattr(fused, "find_spec", lambda name: None)  # CUDA without Triton
    assert fused.row_transform(torch.device("cuda")) is rows.divergence_rows


def test_cuda_gets_the_triton_twin() -> None:
    pytest.importorskip("triton")
    from purified_opsd_trl.kernels import triton_rows

    assert fused.row_transform(torch.device("cuda")) is triton_rows.divergence_rows


# The Triton twin -----------------------------------------------------------------------------------------------------


def check_triton(device: str, cases: list[tuple[int, int, float]]) -> int:
    """Compares the Triton twin with the oracle, and where both are inexact with the torch twin; counts the cases."""
    from purified_opsd_trl.kernels import triton_rows

    count = 0
    for tokens, vocab, std in cases:
        logits = logits_of(tokens, vocab, std)
        divergences = itertools.product((0.0, 0.3, 1.0), (None, 0.01))
        targets = [(10.0, False), (10.0, True)]
        cases_of = [(*one, *two) for one, two in itertools.product(divergences, targets)]
        for beta, kl_clip, pmi_clip, plain in [*cases_of, (0.3, None, None, False), (0.3, None, 0.5, False)]:
            settings = LossSettings(beta=beta, pmi_beta=1.3, pmi_clip=pmi_clip, kl_clip=kl_clip)
            stats, grad = transform(triton_rows.divergence_rows, logits, settings, plain=plain, device=device)
            twin, twin_grad = transform(rows.divergence_rows, logits, settings, plain=plain)
            count += 1
            if std <= 10:
                compare(stats, grad, oracle(logits, settings, plain), plain=plain, tolerance=5e-6)
            for name in STATS[: 4 if plain else None]:
                ours, theirs = getattr(stats, name).cpu(), getattr(twin, name)
                if not torch.isnan(theirs).any():
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6 * std, msg=f"{name} {settings}")
            assert torch.isfinite(grad).all()
            assert (grad.cpu() - twin_grad).norm() <= 1e-5 * twin_grad.norm() + 1e-12
        half = torch.bfloat16 if device == "cuda" else torch.float16
        _, rounded = transform(triton_rows.divergence_rows, logits, settings, device=device, grad_dtype=half)
        assert (rounded.cpu() - twin_grad).norm() <= 4e-3 * twin_grad.norm() + 1e-7
    return count


def test_triton_twin_interpreted() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "42 cases agree" in run.stdout


gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@needs_cuda
def test_triton_twin_compiled() -> None:
    assert check_triton("cuda", [(3, 17, 3.0), (5, 1008, 3.0), (3, 32003, 3.0), (2, 5000, 3e3)]) == 56


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("target", ["purified", "teacher"])
def test_token_loss_on_cuda(dtype: torch.dtype, softcap: float | None, target: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    hidden, base, teacher, probe = (torch.randn(33, 256, generator=generator).to("cuda", dtype) for _ in range(4))
    weight = (torch.randn(32003, 256, generator=generator) / 8).to("cuda", dtype)
    weights = torch.rand(33, generator=generator).cuda() / 33
    settings = LossSettings(target=target, loss_chunk_size=10)
    states = FrozenStates(base=base, delta=teacher - probe, teacher=teacher, reference_only=probe)
    leaf, head_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    result = token_loss(
        leaf, LMHead(head_weight, softcap=softcap), states, LMHead(weight, softcap=softcap), weights, settings
    )
    result.loss.backward()
    delta = (teacher - probe).double() if softcap is None else teacher.double() - probe.double()
    expected = reference.evaluate_hidden(
        hidden.double(),
        reference.Head(weight, softcap=softcap),
        base.double(),
        # the fused path gets the rounded difference of states, and so does the oracle
        teacher.double() if target == "teacher" or softcap is not None else delta + probe.double(),
        probe.double(),
        reference.Head(weight, softcap=softcap),
        weights.double(),
        target=target,
    )
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, wanted in ((leaf.grad, expected.grad_hidden), (head_weight.grad, expected.grad_weight)):
        assert ours is not None and wanted is not None
        assert (ours.double() - wanted).norm() / wanted.norm() <= bound
    torch.testing.assert_close(result.per_token.double(), expected.per_token, rtol=bound, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
def test_the_products_dtype_is_chosen_under_autocast(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[bool, torch.dtype]] = []

    def spy(hidden: torch.Tensor) -> torch.dtype:
        chosen.append((torch.is_autocast_enabled(device), lm_head.operand_dtype(hidden)))
        return chosen[-1][1]

    monkeypatch.setattr(fused, "operand_dtype", spy)
    states = FrozenStates(teacher=torch.randn(3, 8, device=device))
    head = LMHead(torch.randn(20, 8, device=device))
    with torch.autocast(device, torch.bfloat16):
        hidden = torch.randn(3, 8, device=device)
        token_loss(hidden, head, states, head, torch.ones(3, device=device), LossSettings(target="teacher"))
    assert chosen == [(True, torch.bfloat16 if device == "cuda" else torch.float32)]


@gpu
@needs_cuda
def test_fp32_weights_under_autocast_on_cuda() -> None:
    hidden = torch.randn(9, 64, device="cuda", requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(1000, 64, device="cuda") / 4)
    states = FrozenStates(base=torch.randn(9, 64, device="cuda"), delta=torch.randn(9, 64, device="cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        result = token_loss(
            hidden, LMHead(weight), states, LMHead(weight), torch.ones(9, device="cuda") / 9, LossSettings()
        )
    result.loss.backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def main() -> None:
    torch.set_num_threads(1)
    from purified_opsd_trl.kernels import triton_rows

    triton_rows._BLOCK = 64  # ragged tiles, at a size the interpreter gets through
    print(f"{check_triton('cpu', [(2, 17, 3.0), (1, 304, 3.0), (1, 100, 3e3)])} cases agree")


if __name__ == "__main__":
    main()
