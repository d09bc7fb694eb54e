"""
`purified-opsd bench step`: whole optimisation steps on the same model and completions, generation apart.

One step is what a trainer does between a callback's `on_step_begin` and `on_step_end`: prompts and contexts, scoring,
loss, backward, update. Sampling is replaced by fixed completions, the same for every contender, so that nothing is
generated on the clock. `--generation` times sampling them once, to put the difference between the steps in proportion.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from ..extras import require_extra
from .measure import (
    CLOCKS,
    Contender,
    Measurement,
    add_common_arguments,
    alternate,
    as_json,
    environment,
    markdown_table,
    parse,
    select,
    show_bytes,
    show_ratio,
    show_time,
    write_report,
)


PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        **{"layers": 2, "hidden": 256, "heads": 4, "vocab": 49152, "dtype": "float32", "device": "cpu"},
        **{"rows": 4, "prompt": 64, "reference": 96, "completion": 128, "lora_rank": 16},
    },
    "gpu": {
        **{"layers": 36, "hidden": 4096, "heads": 32, "vocab": 151936, "dtype": "bfloat16", "device": "cuda"},
        **{"rows": 8, "prompt": 256, "reference": 1024, "completion": 1024, "lora_rank": 64},
    },
}
_SPECIAL = ("<unk>", "<pad>", "<eos>")


class StepClock(TrainerCallback):
    """Time of the last step, on both clocks."""

    def __init__(self, device: torch.device):
        self.device = device
        self.began = self.last = (0.0, 0.0)

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
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

    def __init__(self, args: argparse.Namespace, device: torch.device, folder: Path):
        from datasets import Dataset

        self.args, self.device, self.folder = args, device, folder
        self.tokenizer = make_tokenizer()
        generator = torch.Generator().manual_seed(args.seed)

        def text(tokens: int) -> str:
            numbers = torch.randint(1000, (tokens,), generator=generator).tolist()
            return " ".join(f"w{number}" for number in numbers)

        rows = [{"prompt": text(args.prompt), "reference": text(args.reference)} for _ in range(args.rows)]
        self.dataset = Dataset.from_list([{**row, "privileged_context": row["reference"]} for row in rows])
        shape = (args.rows, args.completion)
        self.completions = torch.randint(len(_SPECIAL), args.vocab, shape, generator=generator).tolist()

    def model(self) -> PreTrainedModel:
        """A fresh Qwen3 with the same random weights each time."""
        args = self.args
        torch.manual_seed(args.seed)
        config = Qwen3Config(
            vocab_size=args.vocab,
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
            head_dim=args.hidden // args.heads,
            tie_word_embeddings=True,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            bos_token_id=None,
        )
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))

    def arguments(self, name: str) -> dict[str, Any]:
        """What the configs of all contenders share."""
        return {
            "output_dir": str(self.folder / name),
            "max_steps": 1,
            "per_device_train_batch_size": self.args.rows,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": self.args.gradient_checkpointing,
            "max_completion_length": self.args.completion,
            "temperature": 1.0,
            "learning_rate": 1e-6,
            "bf16": False,  # the model is in its dtype already
            "use_cpu": self.device.type == "cpu",
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "seed": self.args.seed,
        }

    def lora(self) -> Any:
        """LoRA on all linear layers but the head."""
        from peft import LoraConfig

        return LoraConfig(r=self.args.lora_rank, lora_alpha=self.args.lora_rank, target_modules="all-linear")

    def ours(self, target: str) -> Any:
        """Our trainer, purified or plain."""
        from ..config import PurifiedOPSDConfig
        from ..trainer import PurifiedOPSDTrainer

        config = PurifiedOPSDConfig(
            **self.arguments(target),
            target=target,  # type: ignore[arg-type]  # one of two, which the config checks
            teacher_prompt_template="{question} {reference}",
            reference_prompt_template="{reference}",
            loss_memory_budget=self.args.memory_budget,
            decomposition_steps=0,  # TRL's trainer has no such monitor
        )
        trainer = PurifiedOPSDTrainer(
            model=self.model(),
            args=config,
            train_dataset=self.dataset,
            processing_class=self.tokenizer,
            peft_config=self.lora(),
        )
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
        trainer = SDFTTrainer(
            model=self.model(),
            args=config,
            train_dataset=self.dataset,
            processing_class=self.tokenizer,
            peft_config=self.lora(),
        )
        setattr(trainer, "_generate", lambda ids: (ids, self.completions[: len(ids)]))  # noqa: B010
        return trainer

    def contender(self, name: str, trainer: Any) -> Contender:
        """One step a repetition, its FLOPs counted once."""
        clock = StepClock(self.device)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)

        def run() -> tuple[float, float]:
            trainer.train()
            return clock.last

        with FlopCounterMode(display=False) as counter:
            run()
        return Contender(name, run, float(counter.get_total_flops()))

    def generation(self) -> dict[str, float]:
        """Time to sample the completions with transformers, in one batch, from the question; on both clocks."""
        model = self.model().eval()
        model.to(device=self.device)
        ids = self.tokenizer(list(self.dataset["prompt"]), return_tensors="pt")["input_ids"].to(self.device)
        length = self.args.completion
        clock = StepClock(self.device)
        clock.on_step_begin()
        with torch.no_grad():
            model.generate(ids, max_new_tokens=length, min_new_tokens=length, do_sample=True)
        clock.on_step_end()
        return dict(zip(("seconds", "cpu_seconds"), clock.last, strict=True))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of a thousand words, so that lengths are what the flags say."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*_SPECIAL, *(f"w{number}" for number in range(1000))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=_SPECIAL[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unk, pad, eos = _SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unk, pad_token=pad, eos_token=eos)


def table(results: dict[str, Measurement], clock: str, generation: dict[str, float] | None) -> list[str]:
    """Markdown table: time, FLOPs, memory, their ratios to TRL's trainer, and the step with generation."""
    sdft, plain = results.get("TRL SDFT plain"), results.get("ours plain")
    rows = []
    for name, result in results.items():
        if result.error is not None or not result.seconds:
            rows.append([name, result.error or "not run", *["-"] * 5])
            continue
        flops = "-" if sdft is None or not sdft.flops else f"{(result.flops or 0.0) / sdft.flops:.2f}"
        proportion = "-"
        if generation is not None and plain is not None and plain.seconds:
            both = (generation[clock] + measured.median(clock) for measured in (result, plain))
            proportion = f"{next(both) / next(both):.3f}"
        rows.append(
            [
                name,
                show_time(result, clock),
                show_ratio(result, sdft, clock),
                f"{(result.flops or 0.0) / 1e9:.0f}",
                flops,
                show_bytes(result.peak_bytes),
                proportion,
            ]
        )
    unit = "ms" if clock == "seconds" else "CPU ms"
    ratios = ("/ SDFT", "GFLOP", "FLOP / SDFT", "peak MiB", "with generation / ours plain")
    return markdown_table(("contender", f"step, {unit} [quartiles]", *ratios), rows)


def make_parser() -> argparse.ArgumentParser:
    """Flags of `purified-opsd bench step`."""
    parser = argparse.ArgumentParser(
        prog="purified-opsd bench step",
        description="Time whole optimisation steps, generation apart: ours purified, ours plain, TRL's SDFT.",
    )
    for name, text in {
        "layers": "decoder layers",
        "hidden": "hidden units",
        "heads": "attention heads",
        "vocab": "vocabulary entries",
        "rows": "completions a step",
        "prompt": "tokens of a question",
        "reference": "tokens of a reference",
        "completion": "tokens of a completion",
        "lora-rank": "rank of LoRA on all linear layers",
    }.items():
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--memory-budget", type=int, default=512, help="MiB of scratch memory of our loss")
    parser.add_argument("--generation", action="store_true", help="also time sampling the completions, once")
    add_common_arguments(parser, "step", PRESETS)
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit status."""
    args, device = parse(make_parser(), PRESETS, argv)
    require_extra("peft", "`bench step`")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, device, Path(folder))
        makers = {
            "ours purified": lambda: bench.ours("purified"),
            "ours plain": lambda: bench.ours("teacher"),
            "TRL SDFT plain": bench.sdft,
        }
        names = select([Contender(name, lambda: None) for name in makers], args.contenders)
        results = alternate([bench.contender(c.name, makers[c.name]()) for c in names], args.repetitions, device)
        generation = bench.generation() if args.generation else None
    settings = {name: getattr(args, name) for name in (*PRESETS["cpu"], "gradient_checkpointing") if name != "device"}
    report = {
        "benchmark": "step",
        "settings": settings,
        "environment": environment(device),
        "generation": generation,
        "contenders": {name: as_json(result) for name, result in results.items()},
    }
    clock = CLOCKS[args.clock]
    lines = table(results, clock, generation)
    if generation is not None:
        lines += ["", f"Sampling the completions with transformers: {generation[clock]:.1f} s, {args.clock} clock"]
    write_report(report, "One optimisation step, generation apart", lines, args.output)
    return 0
