"""
`purified-opsd bench step`: complete optimization steps on the same model and completions, without generation.

One step is what a trainer does between a callback's `on_step_begin` and `on_step_end`: prompts and contexts, scoring,
loss, backward, update. Sampling is replaced by fixed completions, the same for every contender, so that nothing is
generated on the clock. `--generation true` times sampling them once, to put the difference between the steps in
proportion.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from ..config import PurifiedOPSDConfig
from ..extras import require_extra
from ..trainer import PurifiedOPSDTrainer
from . import measure
from .measure import Contender, option


_SPECIAL = ("<unk>", "<pad>", "<eos>")
CONTENDERS = {"ours purified": "purified", "ours plain": "teacher", "TRL SDFT plain": "sdft"}
PADDED = {"ours padded": "padded"}  # purified; beside them where lengths differ, or by name
SPREAD = 16  # longest over shortest completion where lengths differ


def _qwen3(layers: int, hidden: int, intermediate: int, heads: int) -> dict[str, Any]:
    """The shape of a Qwen3 model in bf16, but for the tied head of all; batch and lengths of the paper."""
    return {
        **{"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate},
        **{"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
        **{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "gradient_checkpointing": True},
        **{"prompt_length": 256, "reference_length": 1024, "completion_length": 1024, "lora_r": 64},
        **{"dtype": "bfloat16", "device": "cuda"},
    }


@dataclass
class StepArguments(measure.BenchArguments):
    """Time complete optimization steps without generation: this package purified and plain, TRL's SDFT."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {},
        "Qwen3-0.6B": _qwen3(28, 1024, 3072, 16),
        "Qwen3-1.7B": _qwen3(28, 2048, 6144, 16),
        "Qwen3-4B": _qwen3(36, 2560, 9728, 32),
        "Qwen3-8B": _qwen3(36, 4096, 12288, 32),
        "gpu": _qwen3(36, 4096, 12288, 32),
    }

    num_hidden_layers: int = option(2, "Decoder layers.")
    hidden_size: int = option(256, "Hidden units.")
    intermediate_size: int = option(768, "Hidden units of the feed-forward part.")
    num_attention_heads: int = option(4, "Attention heads.")
    num_key_value_heads: int = option(4, "Heads of keys and values.")
    head_dim: int = option(64, "Units of a head.")
    vocab_size: int = option(49152, "Vocabulary entries.")
    dtype: Literal["float32", "bfloat16"] = option("float32", "Dtype of the model.")
    per_device_train_batch_size: int = option(4, "Rows of a micro-batch; halved while they do not fit into memory.")
    gradient_accumulation_steps: int = option(1, "Micro-batches of a step; doubled where they are halved.")
    gradient_checkpointing: bool = option(False, "Run the student's layers again in the backward pass.")
    prompt_length: int = option(64, "Tokens of a question.")
    reference_length: int = option(96, "Tokens of a reference.")
    completion_length: int = option(128, "Tokens of a completion; of the longest where they differ.")
    lengths: Literal["equal", "lognormal"] = option("equal", "Lengths of the completions.")
    lora_r: int = option(16, "Rank of LoRA on all linear layers.")
    loss_memory_budget: int = option(512, "Scratch memory of our loss in MiB.")
    generation: bool = option(False, "Also time sampling the completions, once.")

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def completion_lengths(self) -> list[int]:
        """Tokens of each row's completion: all the longest, or log-normal with the longest first, seeded."""
        longest, generator = self.completion_length, torch.Generator().manual_seed(self.seed)
        if self.lengths == "equal":
            return [longest] * self.rows
        drawn = torch.empty(self.rows).log_normal_(math.log(longest / 4), math.log(SPREAD) / 4, generator=generator)
        return [longest, *drawn[1:].round().clamp(max(1, longest // SPREAD), longest).int().tolist()]

    def forward_flops(self, count: int, before: int = 0) -> float:
        """Multiply-adds, times two, of the layers for `count` tokens that follow `before` others."""
        width = self.num_attention_heads * self.head_dim
        projections = 2 * self.hidden_size * (width + self.num_key_value_heads * self.head_dim)
        weights = projections + 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (2.0 * weights * count + 4.0 * width * count * (before + count / 2))

    def step_flops(self, purified: bool) -> float:
        """Model FLOPs of one step with LoRA: no recomputation, adapters or padding; the head only at completions."""
        question, total = self.prompt_length, 0.0
        for completion in self.completion_lengths():
            student = self.forward_flops(question + completion)
            teacher = self.forward_flops(question + self.reference_length + completion)
            frozen = teacher + purified * (student + self.forward_flops(self.reference_length + completion))
            head = (4 if purified else 3) * 2.0 * completion * self.vocab_size * self.hidden_size
            total += 2 * student + frozen + head
        return total


class StepClock(TrainerCallback):
    """Time of the last step, on both clocks."""

    def __init__(self, device: torch.device):
        self.device = device
        self.began = self.last = (0.0, 0.0)

    def _now(self) -> tuple[float, float]:
        measure.synchronize(self.device)
        return time.perf_counter(), time.process_time()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The trainer is about to make a step."""
        self.began = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer has made its step."""
        wall, cpu = self._now()
        self.last = wall - self.began[0], cpu - self.began[1]


class Bench:
    """Model, data and trainers of one run."""

    def __init__(self, args: StepArguments, device: torch.device, folder: Path):
        self.args, self.device, self.folder = args, device, folder
        self.tokenizer = make_tokenizer()
        self.parts: dict[str, dict[str, float]] = {}  # seconds of scoring and loss in the last step, by contender
        generator = torch.Generator().manual_seed(args.seed)

        def text(tokens: int) -> str:
            numbers = torch.randint(1000, (tokens,), generator=generator).tolist()
            return " ".join(f"w{number}" for number in numbers)

        rows = []
        for _ in range(args.rows):
            prompt, reference = text(args.prompt_length), text(args.reference_length)
            rows.append({"prompt": prompt, "reference": reference, "privileged_context": reference})
        self.dataset = Dataset.from_list(rows)
        self.completions = [
            torch.randint(len(_SPECIAL), args.vocab_size, (length,), generator=generator).tolist()
            for length in args.completion_lengths()
        ]

    def model(self) -> PreTrainedModel:
        """A fresh Qwen3 with the same random weights each time, made on the device."""
        args = self.args
        torch.manual_seed(args.seed)
        shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        config = Qwen3Config(
            **{name: getattr(args, name) for name in (*shape, "vocab_size", "head_dim")},
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            bos_token_id=None,
        )
        with self.device:
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))

    def arguments(self, name: str) -> dict[str, Any]:
        """What the configs of all contenders share."""
        same = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "seed")
        return {
            **{name: getattr(self.args, name) for name in same},
            "output_dir": str(self.folder / name),
            "max_steps": 1,
            "max_completion_length": self.args.completion_length,
            "temperature": 1.0,
            "learning_rate": 1e-6,
            "bf16": False,  # the model is in its dtype already
            "use_cpu": self.device.type == "cpu",
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }

    def trainer(self, kind: Any, config: Any) -> Any:
        """A trainer of LoRA on all linear layers but the head."""
        from peft import LoraConfig

        lora = LoraConfig(r=self.args.lora_r, lora_alpha=self.args.lora_r, target_modules="all-linear")
        made = kind(
            model=self.model(),
            args=config,
            train_dataset=self.dataset,
            processing_class=self.tokenizer,
            peft_config=lora,
        )
        made.remove_callback(PrinterCallback)
        return made

    def ours(self, target: str) -> Any:
        """Our trainer, purified or plain, or purified and padded."""
        config = PurifiedOPSDConfig(
            **self.arguments(target),
            target="teacher" if target == "teacher" else "purified",
            padding_free="false" if target == "padded" else "auto",
            teacher_prompt_template="{question} {reference}",
            reference_prompt_template="{reference}",
            loss_memory_budget=self.args.loss_memory_budget,
            decomposition_steps=0,  # TRL's trainer has no such monitor
        )
        trainer = self.trainer(PurifiedOPSDTrainer, config)
        # The seam of the rollout: token ids in, token ids out
        setattr(trainer, "_generate_single_turn", lambda ids, *_, **__: self.completions[: len(ids)])  # noqa: B010
        return trainer

    def sdft(self) -> Any:
        """TRL's self-distillation trainer over the full vocabulary, towards the plain teacher."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the module announces that it is experimental
            from trl.experimental.sdft import SDFTConfig, SDFTTrainer

        config = SDFTConfig(
            **self.arguments("sdft"),
            num_generations=1,
            max_prompt_length=None,
            teacher_model_kind="base",
            teacher_prompt_template="{prompt} {privileged_context}",
            distillation_mode="full_logits",
            distillation_alpha=0.5,
            distillation_is_clip=None,
        )
        trainer = self.trainer(SDFTTrainer, config)
        setattr(trainer, "_generate", lambda ids: (ids, self.completions[: len(ids)]))  # noqa: B010
        return trainer

    def contender(self, name: str) -> Contender:
        """One step per repetition, in micro-batches that fit: the first step, off the clock, finds them."""
        args = self.args
        while True:
            try:
                return self._contender(name)
            except torch.OutOfMemoryError:
                if args.per_device_train_batch_size == 1:
                    break
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            args.per_device_train_batch_size, rows = args.per_device_train_batch_size // 2, args.rows
            args.gradient_accumulation_steps = rows // args.per_device_train_batch_size
        return Contender(name, lambda: (_ for _ in ()).throw(torch.OutOfMemoryError()))

    def _contender(self, name: str) -> Contender:
        clock, target = StepClock(self.device), {**CONTENDERS, **PADDED}[name]
        trainer = self.sdft() if target == "sdft" else self.ours(target)
        trainer.add_callback(clock)

        def run() -> tuple[float, float]:
            trainer.train()
            logged = trainer.state.log_history[-1]
            if "scoring/seconds" in logged:
                loss = logged["timing/loss_seconds"] * self.args.gradient_accumulation_steps
                self.parts[name] = {"scoring": logged["scoring/seconds"], "loss": loss}
            return clock.last

        run()
        return Contender(name, run, self.args.step_flops(target in ("purified", "padded")))

    def generation(self) -> dict[str, float]:
        """Time to sample the completions with transformers, in one batch, from the question; on both clocks."""
        model = self.model().eval()
        ids = self.tokenizer(list(self.dataset["prompt"]), return_tensors="pt")["input_ids"].to(self.device)
        length = self.args.completion_length
        clock = StepClock(self.device)
        clock.on_step_begin()
        with torch.no_grad():
            model.generate(ids, max_new_tokens=length, min_new_tokens=length, do_sample=True)
        clock.on_step_end()
        return dict(zip(("seconds", "cpu_seconds"), clock.last, strict=True))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of a thousand words, so that lengths are what the options say."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*_SPECIAL, *(f"w{number}" for number in range(1000))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=_SPECIAL[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unk, pad, eos = _SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unk, pad_token=pad, eos_token=eos)


def table(results: dict[str, Contender], bench: Bench, clock: str, rate: float) -> measure.Table:
    """Time and its parts, speed, memory, ratios to TRL's trainer."""
    args, sdft, unit = bench.args, results.get("TRL SDFT plain"), "ms" if clock == "seconds" else "CPU ms"
    tokens = args.rows * args.prompt_length + sum(args.completion_lengths())
    parts = ["scoring, ms", "student, ms", "loss, ms"]
    header = [f"step, {unit} [quartiles]", *parts, "student tokens/s", "MFU", "peak GiB", "/ SDFT", "FLOP / SDFT"]

    def figures(one: Contender) -> list[str]:
        seconds, flops, split = one.median("seconds"), one.flops or 0.0, ["-"] * 3
        if one.name in bench.parts:
            scoring, loss = bench.parts[one.name].values()
            split = [f"{part * 1e3:.0f}" for part in (scoring, one.seconds[-1] - scoring - loss, loss)]
        peak = None if one.peak_bytes is None else one.peak_bytes + (one.held_bytes or 0)
        speed = [f"{tokens / seconds:.0f}", f"{flops / seconds / rate:.1%}", measure.show_bytes(peak)]
        ratios = [measure.show_ratio(one, sdft, clock), f"{flops / sdft.flops:.2f}" if sdft and sdft.flops else "-"]
        return [measure.show_time(one, clock), *split, *speed, *ratios]

    return measure.tabulate(header, results.values(), figures)


def run(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    args = measure.parse(StepArguments, argv)
    device, clock = args.prepare(), measure.CLOCKS[args.clock]
    require_extra("peft", "`bench step`")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, device, Path(folder))
        names = CONTENDERS if args.lengths == "equal" and not args.contenders else {**CONTENDERS, **PADDED}
        contenders = [bench.contender(name) for name in measure.select(names, args.contenders)]
        results = measure.alternate(contenders, args.repetitions, device)
        generation = bench.generation() if args.generation else None
    rate = measure.matrix_rate(device, getattr(torch, args.dtype))
    report = {
        "benchmark": "step",
        "matrix_rate": rate,
        "generation": generation,
        "contenders": {name: {**result.as_json(), **bench.parts.get(name, {})} for name, result in results.items()},
    }
    rows = table(results, bench, clock, rate)
    if generation is not None:
        rows.append(["sampling with transformers", f"{generation[clock] * 1e3:.0f}", *["-"] * (len(rows[0]) - 2)])
    measure.write_report(args, report, "One optimization step, without generation", rows)
    return 0
