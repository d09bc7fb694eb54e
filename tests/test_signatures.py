"""Freezes what we override, call or import of TRL, so that an upgrade fails here and nowhere else."""

import inspect

import pytest
from trl import DistillationConfig, DistillationTrainer
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.cli.commands.training import _subtract_subsequence
from trl.models import prepare_deepspeed
from trl.models.utils import _ForwardRedirection
from trl.scripts.utils import TrlParser
from trl.trainer.utils import create_model_from_path, get_config_model_id, maybe_gather_lm_head_ctx, pad, use_adapter

from purified_opsd_trl import PurifiedOPSDTrainer


def names(function: object) -> list[str]:
    return [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]


TRAINER_METHODS = {
    "__init__": [
        *("model", "teacher_model", "args", "train_dataset", "eval_dataset", "processing_class", "callbacks"),
        *("optimizers", "quantization_config", "peft_config", "tools"),
    ],
    "_generate_and_score_completions": ["inputs"],
    "_generate": ["prompts"],
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "has_tool_images"],
    "_tokenize_prompts": ["prompts"],
    "_get_last_hidden_state": [
        *("unwrapped_model", "input_ids", "attention_mask", "logits_to_keep", "pixel_values", "image_grid_thw"),
        *("pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids", "mm_token_type_ids"),
        "image_position_ids",
    ],
    "_compute_loss": ["unwrapped_student", "inputs", "num_items_in_batch"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "_set_signature_columns_if_needed": [],
    "_send_telemetry": [],
    "_prepare_inputs": ["generation_batch"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "_get_train_sampler": ["dataset"],
    "_init_training_state": [
        *("max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"),
    ],
    "_run_epoch": [
        *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ],
    "_finalize_training": ["trial", "num_train_samples", "start_time"],
    "_get_grad_norm": ["model", "grad_norm"],
    "log": ["logs", "start_time"],
    "create_model_card": ["model_name", "dataset_name", "tags"],
}


@pytest.mark.parametrize("method", TRAINER_METHODS)
def test_trainer_methods(method: str) -> None:
    assert names(getattr(DistillationTrainer, method)) == TRAINER_METHODS[method]


FUNCTIONS = {
    create_model_from_path: ["model_id", "architecture", "kwargs"],
    get_config_model_id: ["config"],
    maybe_gather_lm_head_ctx: ["params"],
    use_adapter: ["model", "adapter_name"],
    prepare_deepspeed: ["model", "accelerator"],
    _ForwardRedirection.__call__: ["wrapper_module", "original_module", "method", "args", "kwargs"],
    resolve_accelerate_config_argument: ["launch_args"],
    _subtract_subsequence: ["lst", "subseq"],
    TrlParser.parse_args_and_config: [
        *("args", "return_remaining_strings", "fail_with_unknown_args", "separate_remaining_strings"),
    ],
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__qualname__)
def test_functions(function: object) -> None:
    assert names(function) == FUNCTIONS[function]


def test_pad() -> None:
    assert {"padding_value", "padding_side", "pad_to_multiple_of"} <= set(names(pad))


def test_overridden_methods_keep_trls_signature() -> None:
    for name, method in vars(PurifiedOPSDTrainer).items():
        if name in TRAINER_METHODS and name != "__init__":
            assert names(method) == TRAINER_METHODS[name], name


def test_overridden_defaults_exist() -> None:
    fields = DistillationConfig.__dataclass_fields__
    assert {"learning_rate", "beta", "max_completion_length", "vllm_server_host"} <= fields.keys()


def test_our_constructor() -> None:
    assert names(PurifiedOPSDTrainer.__init__) == [
        *("model", "args", "train_dataset", "eval_dataset", "processing_class", "callbacks", "optimizers"),
        *("quantization_config", "peft_config", "tools", "scoring_callback", "purification_collator", "teacher_model"),
    ]
