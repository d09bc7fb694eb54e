"""Padding on the left changes nothing, whatever a model makes of positions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from purified_opsd_trl import PurifiedOPSDConfig, PurifiedOPSDTrainer
from purified_opsd_trl.backbone import backbone, last_hidden_states


# Absolute positions; rotary ones; positions as a bias of the attention, which takes no `position_ids`
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "n_embd": 32,
        "n_head": 2,
        "n_layer": 2,
        "n_positions": 256,
        "initializer_range": 0.3,
    },
    "gpt_neo": {
        **{"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
        **{"window_size": 8, "max_position_embeddings": 256, "initializer_range": 0.3},
    },
    "gpt_bigcode": {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 256, "initializer_range": 0.3},
    "qwen3": {},
    "bloom": {"hidden_size": 32, "n_head": 2, "n_layer": 2, "initializer_range": 0.3},
}
SEQUENCES = ([5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22, 23], [30, 31])


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_equal_rows_alone(make_model: Callable[..., PreTrainedModel], family: str) -> None:
    model = make_model(family, **FAMILIES[family])
    longest = max(map(len, SEQUENCES))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in SEQUENCES])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in SEQUENCES])
    with torch.no_grad():
        padded = last_hidden_states(model, ids, mask, longest - 1)
        for row, sequence in enumerate(SEQUENCES):
            alone = backbone(model)(input_ids=torch.tensor([sequence])).last_hidden_state[0, :-1]
            # fp32: states of size 3 after two layers; a wrong position moves them by more than 1
            torch.testing.assert_close(padded[row, longest - len(sequence) :], alone, rtol=1e-4, atol=1e-4)


def test_an_unmoved_gpt2_has_no_loss_towards_its_own_base(
    make_model: Callable[..., PreTrainedModel], tokenizer: Any, arguments: dict[str, Any]
) -> None:
    class TowardsBase(PurifiedOPSDTrainer):
        def target_logits(self, teacher: torch.Tensor, reference_only: torch.Tensor, base: torch.Tensor) -> Any:
            return base

    rows = [{"prompt": [{"role": "user", "content": "q" * n}], "reference": "r"} for n in (2, 19, 7, 31)]
    trainer = TowardsBase(
        model=make_model("gpt2", **FAMILIES["gpt2"]),
        args=PurifiedOPSDConfig(
            **{**arguments, "max_steps": 1, "per_device_train_batch_size": 4, "scoring_batch_size": 1}
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert abs(loss) < 1e-6  # nats; without positions from the mask it is 0.20
