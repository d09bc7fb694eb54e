"""Output heads of real models, and heads that are sharded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from purified_opsd_trl import head as head_module
from purified_opsd_trl.errors import InputError
from purified_opsd_trl.head import LMHead
from purified_opsd_trl.kernels.settings import LossSettings
from purified_opsd_trl.loss import token_loss
from tests.conftest import ARCHITECTURES, build_model
from tests.loss_cases import make_case, oracle_loss, relative_error


# Heads of real models ------------------------------------------------------------------------------------------------

OTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "cohere2": {"logit_scale": 0.7, "head_dim": 16, "num_key_value_heads": 1},
    "hyperclovax": {"logits_scaling": 0.4, "num_key_value_heads": 1},
    "falcon_h1": {
        "lm_head_multiplier": 0.3,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_ssm": 64,
        "num_key_value_heads": 2,
    },
    "minicpm3": {"dim_model_base": 16, "num_key_value_heads": 2},
    "recurrent_gemma": {"logits_soft_cap": 4.0, "num_key_value_heads": 1, "num_hidden_layers": 3},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2, "tie_word_embeddings": True},
}


def last_hidden_and_logits(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    ids = torch.arange(1, 13).view(1, 12)
    with torch.no_grad():
        return model.base_model(ids).last_hidden_state, model(ids).logits


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHER_FAMILIES])
def test_head_from_model(architecture: str) -> None:
    if architecture not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    if architecture in ARCHITECTURES:
        model = build_model(architecture)
    else:
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        small = {**sizes, "num_hidden_layers": 2, "initializer_range": 0.3, "pad_token_id": 0}
        config = AutoConfig.for_model(architecture, **{**small, **OTHER_FAMILIES[architecture]})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    hidden, logits = last_hidden_and_logits(model)
    head = LMHead.from_model(model)
    torch.testing.assert_close(head.logits(hidden), logits, rtol=1e-4, atol=1e-4)
    raw = hidden @ head.weight.T
    changed = not torch.allclose(raw, logits, rtol=1e-3, atol=1e-3)
    assert changed == (head.bias is not None or head.logit_scale != 1.0 or head.softcap is not None)


def test_head_of_a_tied_model_is_its_embedding() -> None:
    model = build_model(tied=True)
    assert LMHead.from_model(model).weight is model.get_input_embeddings().weight


def test_head_under_lora() -> None:
    model = build_model()
    weight = model.lm_head.weight
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert LMHead.from_model(peft_model).weight is weight


def test_head_in_modules_to_save() -> None:
    peft_model = get_peft_model(build_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trained = LMHead.from_model(peft_model).weight
    assert trained.requires_grad
    with peft_model.disable_adapter():
        original = LMHead.from_model(peft_model).weight
    assert original is not trained and not original.requires_grad


def test_head_with_an_adapter_of_its_own() -> None:
    peft_model = get_peft_model(build_model(), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(InputError, match="remove 'lm_head' from `target_modules`"):
        LMHead.from_model(peft_model)


def test_quantized_head() -> None:
    model = build_model()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(4, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="uint8.*quantization"):
        LMHead.from_model(model)


def test_model_without_a_head() -> None:
    with pytest.raises(InputError, match="no output embeddings"):
        LMHead.from_model(build_model().model)


# Sharded heads -------------------------------------------------------------------------------------------------------


def test_partitioned_heads_are_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3: a partitioned parameter is empty outside the context that gathers it."""
    case = make_case(1000, frozen_width=11)
    full = [torch.nn.Parameter(head.weight.clone()) for head in (case.head, case.frozen_head)]
    data = [p.data for p in full]
    gathered: list[tuple[Any, ...]] = []

    @contextmanager
    def gather(*params: torch.nn.Parameter) -> Iterator[None]:
        gathered.append(params)
        for param, whole in zip(params, data, strict=True):
            param.data = whole
        yield
        for param in params:
            param.data = torch.empty(0, dtype=torch.float64)

    for param in full:
        param.ds_status = "partitioned"
        param.data = torch.empty(0, dtype=torch.float64)
    monkeypatch.setattr(head_module, "maybe_gather_lm_head_ctx", gather)
    hidden = case.hidden.clone().requires_grad_()
    heads = LMHead(full[0]), LMHead(full[1])
    result = token_loss(hidden, heads[0], case.states(("base", "delta")), heads[1], case.weights, LossSettings())
    assert gathered == [tuple(full)]
    full[0].data = data[0]
    result.loss.backward()
    expected = oracle_loss(case, LossSettings())
    assert relative_error(hidden.grad, expected.grad_hidden) <= 1e-10
    assert relative_error(full[0].grad, expected.grad_weight) <= 1e-10 and full[1].grad is None


def test_sharded_tensors(tmp_path: Any) -> None:
    """FSDP2: a `DTensor` head is made whole once, and its gradient goes back to the shards."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        case = make_case(1000, bias=True)
        mesh = init_device_mesh("cpu", (1,))
        weight = torch.nn.Parameter(distribute_tensor(case.head.weight, mesh, [Shard(0)]))
        bias = torch.nn.Parameter(distribute_tensor(case.head.bias, mesh, [Shard(0)]))
        head = LMHead(weight, bias)
        hidden = case.hidden.clone().requires_grad_()
        states = case.states(("base", "delta"))
        token_loss(hidden, head, states, head, case.weights, LossSettings()).loss.backward()
        expected = oracle_loss(case, LossSettings())
        assert isinstance(weight.grad, DTensor) and isinstance(bias.grad, DTensor)
        assert relative_error(weight.grad.full_tensor(), expected.grad_weight) <= 1e-10
        assert relative_error(bias.grad.full_tensor(), expected.grad_bias) <= 1e-10
        assert relative_error(hidden.grad, expected.grad_hidden) <= 1e-10
    finally:
        torch.distributed.destroy_process_group()
