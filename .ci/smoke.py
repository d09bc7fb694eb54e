"""
What `.ci/smoke` runs in an environment that holds the package and nothing else, from a folder outside the checkout:
the import, every subcommand's help, and two steps of training on a tiny model made here. Needs no network.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import purified_opsd_trl


CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]


def write_model(folder: Path) -> None:
    """A two-layer Qwen3 with a byte-level tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>", extra_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def command(*argv: str) -> str:
    """Runs `purified-opsd`, from this environment; returns what it printed."""
    script = Path(sys.executable).with_name("purified-opsd")
    done = subprocess.run([str(script), *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"purified-opsd {' '.join(argv)}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def main() -> None:
    installed = Path(purified_opsd_trl.__file__).resolve()
    assert Path(sys.prefix).resolve() in installed.parents, f"{installed} is not of this environment"
    assert all(hasattr(purified_opsd_trl, name) for name in purified_opsd_trl.__all__)
    version = command("--version").strip()
    overview = command("--help")
    for name in ("train", "diagnose", "evaluate", "bench", "env"):
        assert name in overview and "--help" in command(name, "--help"), name
    write_model(Path("model"))
    rows = [{"problem": f"What is {i} + 1?", "solution": f"It is {i + 1}."} for i in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("--dataset_prompt_column", "problem", "--dataset_reference_column", "solution")
    quiet = ("--report_to", "none", "--disable_tqdm", "True", "--dataloader_pin_memory", "False")
    logs = ("--logging_steps", "1")
    cpu = ("--use_cpu", "True", "--bf16", "False", "--num_processes", "1", "--mixed_precision", "no")
    small = ("--max_steps", "2", "--max_completion_length", "8", "--per_device_train_batch_size", "2")
    data = ("--dataset_name", "rows.jsonl", *columns, "--output_dir", "run")
    command("train", "--model_name_or_path", "model", *data, *small, *cpu, *quiet, *logs)
    state = json.loads(Path("run/checkpoint-2/trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 2 and all(loss > 0 for loss in losses), losses
    assert state["global_step"] == 2 and Path("run/model.safetensors").is_file()
    print(f"purified_opsd_trl {version}, Python {sys.version.split()[0]}: two steps, logged loss {losses}")


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    main()
