"""
Timing contenders side by side: alternated in one process, with spread and peak memory, and a report of it.

Units: seconds, bytes.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError


_CLEAR_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
# value of `--clock` -> the times it means, as [`Measurement`] names them
CLOCKS = {"wall": "seconds", "cpu": "cpu_seconds"}
_PACKAGES = ("purified_opsd_trl", "torch", "triton", "transformers", "trl", "peft", "liger-kernel")


@dataclass
class Contender:
    """
    Something to time.

    Args:
        name (`str`):
            Row of the report.
        run (`Callable[[], tuple[float, float] | None]`):
            One repetition. What has a better clock than the whole call returns its wall-clock and processor time.
        flops (`float`, *optional*):
            Floating-point operations of its matrix products.
        prepare (`Callable[[], None]`, *optional*):
            Runs before each repetition, outside the clock.
    """

    name: str
    run: Callable[[], tuple[float, float] | None]
    flops: float | None = None
    prepare: Callable[[], None] | None = None


@dataclass
class Measurement:
    """
    What a contender took.

    Attributes:
        seconds (`list[float]`):
            Wall-clock time of each repetition.
        cpu_seconds (`list[float]`):
            Processor time of each repetition, all threads together. On a CPU that others use too, the steadier clock.
        peak_bytes (`int`, *optional*):
            Most memory used above what was in use before; `None` where the platform cannot tell.
        flops (`float`, *optional*):
            See [`Contender`].
        error (`str`, *optional*):
            Why there are no figures.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    flops: float | None = None
    error: str | None = None

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


def alternate(contenders: Sequence[Contender], repetitions: int, device: torch.device) -> dict[str, Measurement]:
    """
    Times the contenders in turn, again and again, so that a change of the machine's mood meets them all.

    Args:
        contenders (`Sequence[Contender]`):
            What to time. One that runs out of device memory, or that cannot run here, is reported and left out.
        repetitions (`int`):
            Timed rounds; one untimed round goes before.
        device (`torch.device`):
            Where they run.

    Returns:
        `dict[str, Measurement]`: by name, in order.
    """
    gc.collect()  # what was in use before is not theirs
    results = {c.name: Measurement(flops=c.flops) for c in contenders}
    for repetition in range(repetitions + 1):
        for contender in contenders:
            result = results[contender.name]
            if result.error is not None:
                continue
            if contender.prepare is not None:
                contender.prepare()
            try:
                with PeakMemory(device) as memory:
                    wall, cpu = time.perf_counter(), time.process_time()
                    own = contender.run()
                    _synchronize(device)
                    wall, cpu = own or (time.perf_counter() - wall, time.process_time() - cpu)
            except torch.OutOfMemoryError:
                result.error = "out of memory"
                continue
            except (ImportError, RuntimeError, NotImplementedError) as error:
                result.error = str(error).splitlines()[0]
                continue
            if repetition:
                result.seconds.append(wall)
                result.cpu_seconds.append(cpu)
                if memory.bytes is not None:
                    result.peak_bytes = max(result.peak_bytes or 0, memory.bytes)
    return results


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def add_common_arguments(parser: argparse.ArgumentParser, name: str, presets: Iterable[str]) -> None:
    """Flags that all benchmarks have."""
    parser.add_argument("--preset", choices=sorted(presets), default="cpu", help="sizes; single flags override it")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="clock of the table; JSON has both")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU if there is one")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    parser.add_argument("--repetitions", type=int, default=5, help="timed rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contenders", nargs="+", help="only these, by name")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench") / name, help="<output>.json, <output>.md")


def parse(
    parser: argparse.ArgumentParser, presets: Mapping[str, Mapping[str, Any]], argv: Sequence[str]
) -> tuple[argparse.Namespace, torch.device]:
    """
    Parses the flags over their preset, and sets the number of threads.

    Args:
        parser (`argparse.ArgumentParser`):
            A benchmark's flags, the common ones among them.
        presets (`Mapping[str, Mapping[str, Any]]`):
            Values by preset and flag.
        argv (`Sequence[str]`):
            The command line.

    Returns:
        `tuple[argparse.Namespace, torch.device]`: values and device.

    Raises:
        [`InputError`]: if the device is not there.
    """
    parser.set_defaults(**presets[parser.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args, device


def choose_device(name: str) -> torch.device:
    """
    The device to run on.

    Raises:
        [`InputError`]: if it is not there.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch {torch.__version__} finds no CUDA device; use --device cpu.")
    return device


def select(contenders: Iterable[Contender], names: Sequence[str] | None) -> list[Contender]:
    """
    The contenders asked for.

    Raises:
        [`InputError`]: for a name that is not among them.
    """
    by_name = {c.name: c for c in contenders}
    for name in names or ():
        if name not in by_name:
            raise InputError(f"--contenders: no contender is called {name!r}; there are: {', '.join(by_name)}.")
    return [by_name[name] for name in names] if names else list(by_name.values())


def environment(device: torch.device) -> dict[str, Any]:
    """Device and versions that a figure depends on."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = (
            f"CPU {platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        )
    return {"device": name, "python": platform.python_version(), "versions": versions}


def as_json(measurement: Measurement) -> dict[str, Any]:
    """Figures of one contender, with medians and quartiles."""
    result = asdict(measurement)
    if measurement.seconds:
        for clock in ("seconds", "cpu_seconds"):
            result[f"{clock}_median"] = measurement.median(clock)
            result[f"{clock}_quartiles"] = list(measurement.spread(clock))
    return result


def write_report(report: dict[str, Any], title: str, table: list[str], output: Path) -> None:
    """Writes `<output>.json` and `<output>.md`, and prints the latter."""
    output.parent.mkdir(parents=True, exist_ok=True)
    device = report["environment"]["device"]
    versions = ", ".join(f"{name} {version}" for name, version in report["environment"]["versions"].items())
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    text = "\n".join([f"# {title}", "", f"{device}; {versions}", "", settings, "", *table, ""])
    output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(f"Written to {output.with_suffix('.json')} and {output.with_suffix('.md')}")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, numbers to the right."""
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def show_time(measurement: Measurement, clock: str) -> str:
    """Median and quartiles in milliseconds."""
    low, high = measurement.spread(clock)
    return f"{measurement.median(clock) * 1e3:.0f} [{low * 1e3:.0f}, {high * 1e3:.0f}]"


def show_ratio(one: Measurement, other: Measurement | None, clock: str) -> str:
    """Ratio of two medians, or a dash."""
    if other is None or not other.seconds:
        return "-"
    return f"{one.median(clock) / other.median(clock):.2f}"


def show_bytes(count: int | None) -> str:
    """Mebibytes, or a dash."""
    return "-" if count is None else f"{count / 2**20:.0f}"
