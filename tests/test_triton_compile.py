"""
The CUDA path without a GPU: every variant of the Triton kernel compiled ahead of time, its resources bounded, and the
operators that only CUDA has looked up in the installed torch.

The loss itself says which variants there are: it runs here on the CPU, and what reaches the row transform goes to the
compiler. `python -m tests.test_triton_compile` prints the table of resources in docs/LOG.md.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from purified_opsd_trl.head import LMHead
from purified_opsd_trl.kernels import fused, rows
from purified_opsd_trl.kernels.settings import LossSettings
from purified_opsd_trl.loss import FrozenStates, token_loss


triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from purified_opsd_trl.kernels import triton_rows  # noqa: E402


pytestmark = pytest.mark.skipif(
    not hasattr(triton_rows._divergence_kernel, "warmup"), reason="TRITON_INTERPRET replaces the compiler"
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MODES = ("forward KL", "reverse KL", "JSD")
TILTS = ("purified, clip", "purified, no clip", "teacher")
GRADS = (torch.float32, torch.bfloat16, torch.float16, None)
VOCAB = {"aligned": 1040, "unaligned": 1003}
LDG_WORDS = {"": 1, "64": 2, "128": 4}


# What the loss launches ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for."""

    mode: str
    tilt: str
    kl_clip: bool
    grad: torch.dtype | None
    alignment: str


class Products(TorchDispatchMode):
    """A GPU's one operator that a CPU lacks, `addmm` with an fp32 result, played; `calls` counts it."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.addmm.dtype_out:
            return func(*args, **kwargs)
        self.calls += 1
        total, a, b, dtype = args
        assert a.dtype == b.dtype != dtype and total.dtype == kwargs["out"].dtype == dtype
        return torch.addmm(total, a.to(dtype), b.to(dtype), **kwargs)


def launches() -> Iterator[tuple[Variant, tuple[Any, ...]]]:
    """Runs the loss with each setting that could change the kernel; yields what reaches the row transform."""
    seen: list[tuple[Any, ...]] = []

    def transform(*arguments: Any) -> None:
        seen.append(arguments)
        rows.divergence_rows(*(x.clone() if isinstance(x, Tensor) else x for x in arguments[:4]), *arguments[4:])

    cases = itertools.product(
        ("purified", "teacher", "custom"), (None, 10.0), (0.0, 0.5, 1.0), (None, 1), GRADS, VOCAB.values()
    )
    for (target, pmi_clip, beta, kl_clip, dtype, vocab), loss_type in itertools.product(
        cases, ("divergence", "sampled_token")
    ):
        if loss_type == "sampled_token" and kl_clip is not None:
            continue
        settings = LossSettings(
            target="teacher" if target == "teacher" else "purified",
            loss_type=loss_type,
            beta=beta,
            pmi_clip=pmi_clip,
            kl_clip=kl_clip,
            loss_chunk_size=3,
        )
        custom = (lambda teacher, reference_only, base: teacher) if target == "custom" else None
        operand = torch.float32 if dtype is None else dtype
        hidden, *states = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0)).to(operand)
        weight = torch.randn(vocab, 8).to(operand)
        hidden.requires_grad_(dtype is not None)
        frozen = FrozenStates(*states)
        labels = torch.zeros(4, dtype=torch.int64) if loss_type == "sampled_token" else None
        with pytest.MonkeyPatch.context() as patch, Products() as products:
            patch.setattr(fused, "row_transform", lambda device: transform)
            patch.setattr(fused, "operand_dtype", lambda hidden: hidden.dtype)
            head = LMHead(weight)
            token_loss(
                *(hidden, head, frozen, head, torch.ones(4), settings),
                labels=labels,
                target_logits=custom,
                used_vocab=vocab - 1,
            )
        assert (products.calls > 0) == (operand != torch.float32)
    for arguments in seen:
        student, _, delta, _, settings, _, grad, _ = arguments
        yield (
            Variant(
                "forward KL" if settings.beta == 0 else "reverse KL" if settings.beta == 1 else "JSD",
                "teacher" if delta is None else "purified, no clip" if settings.pmi_clip is None else "purified, clip",
                settings.kl_clip is not None,
                None if grad is None else grad.dtype,
                next(name for name, vocab in VOCAB.items() if vocab == student.shape[1]),
            ),
            arguments,
        )


@pytest.fixture(scope="module")
def variants() -> dict[Variant, tuple[Any, ...]]:
    return dict(launches())


def test_the_variants_are_those_of_the_table(variants: dict[Variant, tuple[Any, ...]]) -> None:
    expected = {Variant(*one) for one in itertools.product(MODES, TILTS, (False, True), GRADS, VOCAB)}
    assert set(variants) == expected


# The compiler --------------------------------------------------------------------------------------------------------


class Offline:
    """What Triton asks a driver before it compiles, answered for a device that is not there."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> str:
        return str(self.target.arch)

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@dataclass(frozen=True)
class Report:
    """Resources of one compiled kernel; `blocks` are resident on one multiprocessor at a time."""

    registers: int
    spills: int
    shared: int  # bytes
    blocks: int
    load_bytes: int  # of the narrowest load in the loops
    instructions: tuple[float, ...] = ()  # of each loop, per entry of a row; not for AMD
    exchanges: int = 0  # between threads, in the loops; not for AMD


def compiled(arguments: tuple[Any, ...], target: GPUTarget) -> Any:
    """The kernel that `divergence_rows` would launch with these arguments on such a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "hip", "6" if target.backend == "hip" else None)
        kernel_arguments, options = triton_rows.launch(*arguments)
    driver.set_active(Offline(target))
    try:
        return triton_rows._divergence_kernel.warmup(*kernel_arguments, grid=(1,), **options)
    except Exception as error:
        if "ld.lld not found" in str(error):  # Triton 3.4, which torch 2.8 asks for, lacks a linker for AMD
            pytest.skip(str(error))
        raise
    finally:
        if torch.cuda.is_available():
            driver.reset_active()


def report_of(kernel: Any, tensors: int) -> Report:
    """Resources of a kernel whose first loop reads `tensors` tensors."""
    threads = kernel.metadata.num_warps * kernel.metadata.target.warp_size
    if kernel.metadata.target.backend == "hip":
        text = kernel.asm["amdgcn"]
        found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\n", text)}
        registers = found["vgpr_count"]
        waves = min(8, 512 // (-(-registers // 8) * 8))  # per SIMD, of which a compute unit has four
        spills = found["vgpr_spill_count"] + found["sgpr_spill_count"] + found["private_segment_fixed_size"]
        loads = re.findall(r"(?:buffer|global)_load_dword(?:x(\d))?\s", text)
        load_bytes = 4 * min(int(words or 1) for words in loads)
        return Report(registers, spills, kernel.metadata.shared, 4 * waves // kernel.metadata.num_warps, load_bytes)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (_cuobjdump(option, file.name) for option in ("--dump-resource-usage", "-sass"))
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    local = sum(" STL" in f" {text}" or " LDL" in f" {text}" for _, text in instructions)
    blocks = min(2048 // threads, 65536 // (-(-found["REG"] // 8) * 8 * threads))
    first, tail, *others = _loops(instructions, tensors)
    assert tail[0] == first[0]  # over the ids beyond the tokenizer: a block or two per row, not counted
    loads, counts, exchanges = zip(first, *others, strict=True)
    spills = found["STACK"] + found["LOCAL"] + local
    return Report(found["REG"], spills, kernel.metadata.shared, blocks, 4 * min(loads), counts, sum(exchanges))


def _cuobjdump(option: str, path: str) -> str:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([binary, option, path], capture_output=True, text=True, check=True).stdout


def _loops(instructions: list[tuple[int, str]], tensors: int) -> Iterator[tuple[int, float, int]]:
    """Words of the narrowest load, instructions per entry and exchanges between threads, of each loop that loads."""
    for end, text in instructions:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch is None or int(branch[1], 16) >= end:
            continue
        body = [text for at, text in instructions if int(branch[1], 16) <= at <= end]
        widths = [LDG_WORDS[re.search(r"LDG\.E\.?(\d*)", text)[1]] for text in body if "LDG" in text]  # type: ignore[index]
        exchanges = sum(bool(re.search(r"\b(SHFL|BAR|LDS|STS)\b", text)) for text in body)
        if widths:  # four entries of every tensor, or a multiple of it where the compiler unrolled the loop
            yield min(widths), len(body) / (sum(widths) / tensors), exchanges
            tensors = 2


def check(name: str, chosen: list[Variant], variants: dict[Variant, tuple[Any, ...]]) -> None:
    for variant in chosen:
        report = report_of(compiled(variants[variant], TARGETS[name]), 2 if variant.tilt == "teacher" else 3)
        what = f"{name} {variant}: {report}"
        assert report.blocks >= 2, what
        assert report.spills == 0, what
        assert report.shared <= 1024, what  # for the sums after a pass, none for a change of layout
        assert report.load_bytes == (16 if variant.alignment == "aligned" else 4), what
        assert report.exchanges == 0, what
        if TARGETS[name].backend == "cuda":
            passes = 1 + (variant.mode != "forward KL" or variant.kl_clip) + (variant.grad is not None)
            assert len(report.instructions) == passes, what


def selection(name: str) -> list[Variant]:
    """All that the default loss can launch, and each mode, target, bound and dtype; others on another architecture."""
    default = [Variant("JSD", TILTS[0], False, grad, alignment) for grad, alignment in itertools.product(GRADS, VOCAB)]
    turn = list(TARGETS).index(name)
    others = [
        Variant(mode, TILTS[(i + turn) % 3], kl_clip, GRADS[(i + 2 * kl_clip + turn) % 4], alignment)
        for (i, mode), (kl_clip, alignment) in itertools.product(
            enumerate(MODES), zip((False, True), VOCAB if turn % 2 else reversed(VOCAB), strict=True)
        )
    ]
    return list(dict.fromkeys(default + others))


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_variants_compile_within_their_resources(name: str, variants: dict[Variant, tuple[Any, ...]]) -> None:
    chosen = selection(name)
    assert {v.mode for v in chosen} == set(MODES) and {v.tilt for v in chosen} == set(TILTS)
    assert {v.grad for v in chosen} == set(GRADS) and {v.kl_clip for v in chosen} == {False, True}
    check(name, chosen, variants)


@pytest.mark.every_variant
@pytest.mark.parametrize("name", TARGETS)
def test_every_variant_compiles_within_its_resources(name: str, variants: dict[Variant, tuple[Any, ...]]) -> None:
    check(name, list(variants), variants)


def test_fp64_rows_take_the_torch_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel accumulates in fp32 and does not compile for fp64 rows, which fp64 hidden states on CUDA bring."""
    generator = torch.Generator().manual_seed(0)
    hidden, base, delta = torch.randn(3, 2, 17, generator=generator, dtype=torch.float64)
    head, states = LMHead(torch.eye(17, dtype=torch.float64)), FrozenStates(base=base, delta=delta)
    expected = token_loss(hidden, head, states, head, torch.ones(2), LossSettings())
    monkeypatch.setattr(fused, "row_transform", lambda device: triton_rows.divergence_rows)
    assert torch.equal(token_loss(hidden, head, states, head, torch.ones(2), LossSettings()).loss, expected.loss)


# The operators -------------------------------------------------------------------------------------------------------


def test_products_with_a_result_in_fp32_are_in_the_registry() -> None:
    """`launches` runs the calls; this says in words what an older torch would lack."""
    assert "dtype_out" in torch.ops.aten.addmm.overloads()
    arguments = torch.ops.aten.addmm.dtype_out._schema.arguments
    positional = [x.name for x in arguments if not x.kwarg_only]
    assert positional == ["self", "mat1", "mat2", "out_dtype"]
    assert {"beta", "alpha", "out"} <= {x.name for x in arguments if x.kwarg_only}


# The table -----------------------------------------------------------------------------------------------------------


def main() -> None:
    print(
        "| | | threads | registers | spills | shared, bytes | blocks | load, bytes | instructions per entry, by pass |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---|")
    found = dict(launches())
    names = sys.argv[1:] or list(TARGETS)
    for name, alignment, mode in itertools.product(names, VOCAB, reversed(MODES)):
        kernel = compiled(found[Variant(mode, TILTS[0], False, torch.bfloat16, alignment)], TARGETS[name])
        report = report_of(kernel, 3)
        threads = kernel.metadata.num_warps * TARGETS[name].warp_size
        counts = " + ".join(f"{count:.0f}" for count in report.instructions) or "-"
        cells = (threads, *astuple(report)[:5], counts)
        print(f"| {name}, {alignment} | {mode} |", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
