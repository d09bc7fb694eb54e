"""
Shared fixtures: a byte-level tokenizer, tiny models of five architectures, small datasets. Nothing needs a network.

`SPECIAL_TOKENS` and the byte values make token ids readable: the id of a byte is the byte (`ord("a") == 97`), special
tokens follow from 256 on.
"""

import os
import tempfile
from pathlib import Path


# Libraries read these when they are imported; subprocesses started by tests inherit them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["CI"] = "1"  # TRL sends no telemetry in CI
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # they would count among the lines of an error
_DATASETS_CACHE = tempfile.TemporaryDirectory(prefix="purified-opsd-tests-")
os.environ["HF_DATASETS_CACHE"] = _DATASETS_CACHE.name

import copy  # noqa: E402
import json  # noqa: E402
import socket  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)


FIXTURES = Path(__file__).parent / "fixtures"
THREADS = int(os.environ.get("TEST_THREADS", "1"))  # of torch in this process; `.ci/numerics` runs with 1 and with 2

SPECIAL_TOKENS = (
    "<pad>",  # 256
    "<s>",  # 257, the default bos
    "<|endoftext|>",  # 258
    "<|im_start|>",  # 259
    "<|im_end|>",  # 260
    "<|begin_of_text|>",  # 261
    "<|start_header_id|>",  # 262
    "<|end_header_id|>",  # 263
    "<|eot_id|>",  # 264
    "<bos>",  # 265
    "<start_of_turn>",  # 266
    "<end_of_turn>",  # 267
    "<｜begin▁of▁sentence｜>",  # 268
    "<｜User｜>",  # 269
    "<｜Assistant｜>",  # 270
    "<｜end▁of▁sentence｜>",  # 271
)
ADDED_TOKENS = ("<think>", "</think>")  # 272, 273: tokens of their own, but kept by `skip_special_tokens`

# chat template -> (bos, eos) of its model family
TEMPLATES = {
    "chatml": ("<s>", "<|im_end|>"),
    "chatml_no_system": ("<s>", "<|im_end|>"),
    "qwen3": (None, "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<end_of_turn>"),
    "deepseek_r1_distill": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "olmo3_think": ("<|endoftext|>", "<|endoftext|>"),
}

# What makes each architecture's head unlike the plain one: scale, softcap, bias
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 32, "num_key_value_heads": 1, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 32},
    "cohere": {"logit_scale": 0.6},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.2},
    "phi": {"partial_rotary_factor": 0.5},  # its head has a bias
}


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def build_tokenizer(template: str | None = "chatml", add_bos: bool = False) -> PreTrainedTokenizerFast:
    """
    A byte-level tokenizer without merges: one token a byte, `id == byte`.

    Args:
        template (`str`, *optional*, defaults to `"chatml"`): file name in `fixtures/chat_templates`, without suffix.
        add_bos (`bool`, *optional*, defaults to `False`): whether text (not chats) starts with BOS, as Llama's does.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    backend = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.add_tokens([AddedToken(token, normalized=False) for token in ADDED_TOKENS])
    bos, eos = TEMPLATES[template] if template is not None else ("<s>", "<|endoftext|>")
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in (bos, eos, "<pad>")],
        model_max_length=2048,
    )
    if template is not None:
        tokenizer.chat_template = (FIXTURES / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    return tokenizer


def build_model(
    architecture: str = "qwen3", *, tied: bool = False, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """
    A two-layer fp32 model in eval mode whose next-token distributions differ visibly between contexts.

    Args:
        architecture (`str`, *optional*, defaults to `"qwen3"`): key of `ARCHITECTURES`, or another with a plain head.
        tied (`bool`, *optional*, defaults to `False`): whether head and embedding share their weight.
        seed (`int`, *optional*, defaults to `0`): seed of the weights.
        overrides: fields of the model's config.
    """
    config = AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": 256 + len(SPECIAL_TOKENS) + len(ADDED_TOKENS),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": tied,
            "pad_token_id": 256,
            "bos_token_id": 257,
            "eos_token_id": 260,
            # the usual 0.02 gives almost uniform predictions, under which any two contexts agree
            "initializer_range": 0.3,
            "dtype": "float32",
            **ARCHITECTURES.get(architecture, {}),
            **overrides,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        bias = model.get_output_embeddings().bias
        if bias is not None:  # initialized to zero, which would hide a bias that is ignored
            torch.nn.init.normal_(bias)
    return model.eval()


def pytest_report_header() -> str:
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, threads: {THREADS}"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    set_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Factory of tokenizers, see `build_tokenizer`."""
    return build_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A fresh tokenizer with the plain ChatML template."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """Factory of models, see `build_model`."""
    return build_model


@pytest.fixture(scope="session")
def make_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory of folders for `from_pretrained`: model, tokenizer and chat template. One folder for equal arguments."""
    folders: dict[str, Path] = {}

    def make(architecture: str = "qwen3", *, template: str | None = "chatml", **kwargs: Any) -> Path:
        key = json.dumps([architecture, template, kwargs], sort_keys=True)
        if key not in folders:
            tokenizer = build_tokenizer(template)
            folder = tmp_path_factory.mktemp(architecture)
            build_model(architecture, **{"eos_token_id": tokenizer.eos_token_id, **kwargs}).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders[key] = folder
        return folders[key]

    return make


@pytest.fixture(scope="session")
def model_dir(make_model_dir: Callable[..., Path]) -> Path:
    """Folder of an untied tiny Qwen3 with a ChatML tokenizer. Do not write into it."""
    return make_model_dir()


def read_rows(name: str) -> list[dict[str, Any]]:
    """Rows of `fixtures/data/<name>.jsonl`."""
    lines = (FIXTURES / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def conversational_dataset() -> Dataset:
    """Eight rows with messages in `prompt` (system turns and several turns among them) and text in `reference`."""
    return Dataset.from_list(read_rows("conversational"))


@pytest.fixture
def standard_dataset() -> Dataset:
    """Eight rows with text in `prompt` and in `reference`."""
    return Dataset.from_list(read_rows("standard"))


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    """Keyword arguments of a quick, quiet, offline fp32 run of two steps on the CPU."""
    return {
        "output_dir": str(tmp_path / "run"),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "seed": 0,
    }


@pytest.fixture
def build(
    make_model: Callable[..., PreTrainedModel],
    tokenizer: Any,
    conversational_dataset: Dataset,
    arguments: dict[str, Any],
) -> Callable[..., Any]:
    """Factory of trainers on the tiny model; `lora=True` and any field of the config."""
    from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer
    from tests.trainer_cases import LORA

    def make(
        lora: bool = False,
        architecture: str = "qwen3",
        trainer_class: type[PurifiedOPSDTrainer] = PurifiedOPSDTrainer,
        trainer_kwargs: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **fields: Any,
    ) -> PurifiedOPSDTrainer:
        return trainer_class(
            **{
                "model": make_model(architecture, **(model_kwargs or {})),
                "args": PurifiedOPSDConfig(**{**arguments, **fields}),
                "train_dataset": conversational_dataset,
                "processing_class": tokenizer,
                "peft_config": copy.deepcopy(LORA) if lora else None,
                **(trainer_kwargs or {}),
            }
        )

    return make


@pytest.fixture
def prepare(tokenizer, tmp_path, capsys):
    """Checks a dataset; returns what is left and what was printed. `reader` are arguments of `reader_of`."""

    from purified_opsd_trl.dataset import DatasetCheck
    from tests.dataset_cases import reader_of

    def run(dataset, policy="error", invalid="error", tokenizer=tokenizer, least=1, cache=None, **reader):
        reader = reader_of(tokenizer, truncate=policy == "truncate", **reader)
        check = DatasetCheck(reader, invalid, policy, str(tmp_path), Accelerator(cpu=True), False, cache)
        prepared = check(dataset, "train_dataset", least)
        return prepared, capsys.readouterr().out.splitlines()

    return run
