"""Samples are what the model itself draws; adapters leave nothing behind."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from purified_opsd_trl.evaluate.backends import Request, Sampling, TransformersBackend


def test_greedy_samples_are_what_the_model_generates(model_dir: Path, tokenizer: Any, make_model: Any) -> None:
    backend = TransformersBackend(str(model_dir), "float32", batch_size=3)
    prompts = ["a", "some longer prompt", "bb"]
    requests = [Request(("b", str(i), 0), list(p.encode()), seed=0) for i, p in enumerate(prompts)]
    drawn = {c.key[1]: c for c in backend.generate(requests, Sampling(0.0, 1.0, 0, 10))}
    model = make_model()
    for i, prompt in enumerate(prompts):
        ids = list(prompt.encode())
        expected: list[int] = []
        while len(expected) < 10 and not (expected and expected[-1] == tokenizer.eos_token_id):
            expected.append(model(torch.tensor([ids + expected])).logits[0, -1].argmax().item())
        ended = expected[-1] == tokenizer.eos_token_id
        assert drawn[str(i)].ids == (expected[:-1] if ended else expected)
        assert drawn[str(i)].truncated is not ended


@pytest.fixture
def penalised(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Path:
    """A model whose generation config has penalties and filters, and two end tokens."""
    model = make_model()
    model.generation_config.update(
        repetition_penalty=5.0, no_repeat_ngram_size=2, do_sample=True, min_p=0.9, suppress_tokens=list(range(200))
    )
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 97]
    model.save_pretrained(tmp_path / "penalised")
    tokenizer.save_pretrained(tmp_path / "penalised")
    return tmp_path / "penalised"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_models_own_generation_config_changes_no_sample(
    temperature: float,
    with_adapter: bool,
    penalised: Path,
    make_model_dir: Callable[..., Path],
    make_adapter: Callable[..., str],
) -> None:
    requests = [Request(("b", str(i), 0), list(p.encode()), seed=i) for i, p in enumerate(("one", "two words"))]
    adapter = make_adapter("new tokens", "qwen3") if with_adapter else None
    drawn = []
    for folder in (penalised, make_model_dir(eos_token_id=[260, 97])):
        backend = TransformersBackend(str(folder), "float32", 2)
        backend.load(adapter)
        drawn.append(list(backend.generate(requests, Sampling(temperature, 1.0, 0, 40))))
    assert drawn[0] == drawn[1]
    assert any(len(set(completion.ids)) < len(completion.ids) for completion in drawn[0])


def test_every_end_token_ends_a_completion(penalised: Path) -> None:
    backend = TransformersBackend(str(penalised), "float32", 1)
    (long,) = backend.generate([Request(("b", "0", 0), list(b"one"), 0)], Sampling(0.0, 1.0, 0, 40))
    for end in (long.ids[3], [260, long.ids[3]]):
        backend.model.generation_config.eos_token_id = end
        (short,) = backend.generate([Request(("b", "0", 0), list(b"one"), 0)], Sampling(0.0, 1.0, 0, 40))
        assert short.ids == long.ids[: long.ids.index(long.ids[3])] and not short.truncated


ADAPTERS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head and embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "new tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [97, 98]},
    "on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "PiSSA": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
}


@pytest.fixture
def make_adapter(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """Factory of folders of adapters whose every part was moved."""

    def make(kind: str, architecture: str, **kwargs: Any) -> str:
        model = get_peft_model(make_model(architecture, **kwargs), LoraConfig(r=2, **ADAPTERS[kind]))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or (kind == "on the embeddings" and "embed_tokens.base_layer" in name):
                parameter.data.add_(torch.randn(parameter.shape), alpha=0.3)
        model.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return make


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(("architecture", "tied"), [("qwen3", True), ("phi", False)])
def test_an_adapter_leaves_nothing_in_the_base(
    kind: str,
    architecture: str,
    tied: bool,
    make_model_dir: Callable[..., Path],
    make_adapter: Callable[..., str],
) -> None:
    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([[97, 98, 99, 100]])).logits

    folders = [make_adapter(name, architecture, tied=tied) for name in (kind, "head")]
    backend, fresh = (TransformersBackend(str(make_model_dir(architecture, tied=tied)), "float32", 1) for _ in "ab")
    before = {name: weight.clone() for name, weight in backend.model.named_parameters()}
    plain = logits(backend.model)
    for folder in (*folders, folders[0]):
        backend.load(folder)
        alone = PeftModel.from_pretrained(copy.deepcopy(fresh.model), folder).eval()
        assert torch.equal(logits(backend.model), logits(alone)) and not torch.equal(logits(alone), plain)
    backend.load(None)
    after = dict(backend.model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert (backend.model.get_input_embeddings().weight is backend.model.get_output_embeddings().weight) is tied
    assert torch.equal(logits(backend.model), plain)
