"""
Timing contenders side by side: arguments that all benchmarks share, alternation, spread, peak memory, and the report.

Units: seconds, bytes.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch

from ..arguments import CommandParser, check_types
from ..env import environment
from ..errors import InputError


_CLEAR_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
# value of `clock` -> the times it means, as [`Contender`] names them
CLOCKS = {"wall": "seconds", "cpu": "cpu_seconds"}
_NAMED = ("torch", "triton", "transformers", "trl", "peft", "liger-kernel")
Table = list[list[str]]  # the first row is the header
# Names that options once had
RENAMED = {
    **{"output": "output_dir", "memory_budget": "loss_memory_budget", "chunk_size": "loss_chunk_size"},
    **{"layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads", "vocab": "vocab_size"},
    **{"prompt": "prompt_length", "reference": "reference_length", "completion": "completion_length"},
    **{"rows": "per_device_train_batch_size", "lora_rank": "lora_r", "references": "reference_lengths"},
    "compile": "torch_compile",
}


def option(default: Any, help: str) -> Any:
    """Field of a dataclass of arguments."""
    made = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": help}, **made)


@dataclass
class BenchArguments:
    """Arguments that all benchmarks have. The defaults of a subclass are its preset `cpu`."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"cpu": {}}

    preset: str = option("cpu", "Sizes; single options take precedence over it.")
    clock: Literal["wall", "cpu"] = option("wall", "Clock of the table. The JSON file has both.")
    device: str = option("cpu", "cpu, cuda, cuda:1; auto takes a GPU if there is one.")
    threads: int | None = option(None, "Threads of torch on the CPU.")
    repetitions: int = option(5, "Timed rounds, after one that is not timed.")
    seed: int = option(0, "Seed of weights, states and token ids.")
    contenders: list[str] = option([], "Only these, by name.")
    output_dir: str = option("outputs/bench", "Folder of the report.")

    def __post_init__(self) -> None:
        check_types(self)
        if self.preset not in self.PRESETS:
            raise InputError(f"`preset` must be one of {', '.join(self.PRESETS)}, got {self.preset!r}.")
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1 and name != "seed":
                raise InputError(f"`{name}` must be at least 1, got {value}.")

    def prepare(self) -> torch.device:
        """Sets the number of threads and returns the device to run on."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        device = torch.device(kind)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"`device: {kind}`: torch {torch.__version__} finds no CUDA device; use --device cpu.")
        return device


Arguments = TypeVar("Arguments")


def parse(kind: type[Arguments], argv: Sequence[str]) -> Arguments:
    """Arguments of a command line over those of their preset."""
    name = kind.__name__.removesuffix("Arguments").lower()

    def parser() -> CommandParser:
        return CommandParser([kind], f"purified-opsd bench {name}", kind.__doc__, renamed=RENAMED)

    (first,) = parser().parse(argv)
    over_preset = parser()
    over_preset.set_defaults(**kind.PRESETS[first.preset])  # type: ignore[attr-defined]
    (args,) = over_preset.parse(argv)
    return args


@dataclass
class Contender:
    """Something to time, and what it took. Where `run` has a better clock, it returns wall and processor time."""

    name: str
    run: Callable[[], tuple[float, float] | None]
    flops: float | None = None  # of its matrix products
    prepare: Callable[[], None] | None = None  # before each repetition, outside the clock
    share: float = 1.0  # of the work that the others do
    seconds: list[float] = field(default_factory=list)  # of each repetition
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads; steadier on a CPU that others use too
    peak_bytes: int | None = None  # above what was in use before; `None` where the platform cannot tell
    held_bytes: int | None = None  # in use before, on a GPU
    error: str | None = None  # why there are no figures

    def median(self, clock: str) -> float:
        """Median of `"seconds"` or `"cpu_seconds"`."""
        return statistics.median(getattr(self, clock))

    def spread(self, clock: str) -> tuple[float, float]:
        """First and third quartile."""
        values = getattr(self, clock)
        if len(values) == 1:
            return values[0], values[0]
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return low, high

    def as_json(self) -> dict[str, Any]:
        """All figures, with medians and quartiles."""
        result = {name: value for name, value in vars(self).items() if name not in ("run", "prepare")}
        for clock in CLOCKS.values() if self.seconds else ():
            result[f"{clock}_median"] = self.median(clock)
            result[f"{clock}_quartiles"] = list(self.spread(clock))
        return result


class PeakMemory:
    """Context that measures the most memory used above the start: of the device, or the process's resident memory."""

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None
        self.start: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
        else:
            self.start = self._resident("VmRSS") if _reset_peak() else None
        return self

    def __exit__(self, *exception: object) -> None:
        if self.start is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.start
        else:
            self.bytes = self._resident("VmHWM") - self.start

    @staticmethod
    def _resident(name: str) -> int:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024


def _reset_peak() -> bool:
    """Resets the kernel's high-water mark of this process's resident memory; False where there is none."""
    try:
        _CLEAR_PEAK.write_text("5")
    except OSError:
        return False
    return True


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(contenders: Iterable[Contender], repetitions: int, device: torch.device) -> dict[str, Contender]:
    """Times the contenders in turn, again and again, after an untimed round; one that cannot run keeps its error."""
    gc.collect()  # what was in use before is not theirs
    results = {one.name: one for one in contenders}
    for repetition in range(repetitions + 1):
        for one in (one for one in results.values() if one.error is None):
            if one.prepare is not None:
                one.prepare()
            try:
                with PeakMemory(device) as memory:
                    wall, cpu = time.perf_counter(), time.process_time()
                    own = one.run()
                    synchronize(device)
                    wall, cpu = own or (time.perf_counter() - wall, time.process_time() - cpu)
            except (ImportError, RuntimeError) as error:
                memory_is_out = isinstance(error, torch.OutOfMemoryError)
                one.error = "out of memory" if memory_is_out else (str(error) or type(error).__name__).splitlines()[0]
                continue
            if repetition:
                one.seconds.append(wall)
                one.cpu_seconds.append(cpu)
                one.held_bytes = memory.start if device.type == "cuda" else None
                if memory.bytes is not None:
                    one.peak_bytes = max(one.peak_bytes or 0, memory.bytes)
    return results


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large matrix product, the best of three."""
    size, dtype = (8192, dtype) if device.type == "cuda" else (512, torch.float32)
    a, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(4):  # the first of them warms up
        synchronize(device)
        started = time.perf_counter()
        torch.mm(a, a, out=out)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds)


def select(names: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """The names asked for, or all of them."""
    names = list(names)
    for name in wanted:
        if name not in names:
            raise InputError(f"`contenders`: no contender is called {name!r}; there are: {', '.join(names)}.")
    return list(wanted) or names


def write_report(args: BenchArguments, report: dict[str, Any], title: str, table: Table) -> None:
    """Writes `<output_dir>/<benchmark>.json` and `.md`, and prints the latter."""
    path = Path(args.output_dir) / report["benchmark"]
    path.parent.mkdir(parents=True, exist_ok=True)
    found = environment()
    report = {**report, "settings": asdict(args), "environment": found, "table": table}
    device = found["CPU"] if torch.device(args.prepare()).type == "cpu" else found["accelerator 0"]
    described = ", ".join([device, *(f"{name} {found[name]}" for name in _NAMED)])
    settings = ", ".join(f"{name} {value}" for name, value in asdict(args).items() if name != "output_dir")
    text = "\n".join([f"# {title}", "", described, "", settings, "", *markdown(table), ""])
    path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"{text}\nWritten to {path}.json and {path}.md")


def tabulate(header: list[str], contenders: Iterable[Contender], figures: Callable[[Contender], list[str]]) -> Table:
    """A row per contender: its figures, or its error."""
    rows = [["contender", *header]]
    for one in contenders:
        cells = [one.error, *["-"] * (len(header) - 1)] if one.error is not None else figures(one)
        rows.append([one.name, *cells])
    return rows


def markdown(table: Table) -> list[str]:
    """Lines of a Markdown table, numbers to the right."""
    lines = [f"| {' | '.join(row)} |" for row in table]
    return [lines[0], "|---|" + "---:|" * (len(table[0]) - 1), *lines[1:]]


def show_time(one: Contender, clock: str) -> str:
    """Median and quartiles in milliseconds."""
    low, high = one.spread(clock)
    return f"{one.median(clock) * 1e3:.0f} [{low * 1e3:.0f}, {high * 1e3:.0f}]"


def show_ratio(one: Contender, other: Contender | None, clock: str) -> str:
    """Ratio of two medians for the same work, or a dash."""
    if other is None or not other.seconds:
        return "-"
    return f"{one.median(clock) / one.share / (other.median(clock) / other.share):.2f}"


def show_bytes(count: int | None) -> str:
    """Gibibytes, or a dash."""
    return "-" if count is None else f"{count / 2**30:.3f}"
