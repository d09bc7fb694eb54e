"""Checks of [`PurifiedOPSDConfig`] that involve several settings, or the machine."""

import os
import re
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging

from .arguments import check_markers
from .errors import InputError


logger = logging.get_logger(__name__)

_PLACEHOLDER = re.compile(r"\{(question|reference|images)\}")


def check_templates(args: Any) -> None:
    """Checks the columns' names and the placeholders of the templates."""
    if args.reference_column == "prompt":
        raise InputError(
            "`reference_column` cannot be `prompt`, which holds the question. Rename the columns, or on the "
            "command line name them with `dataset_prompt_column` and `dataset_reference_column`."
        )
    expected = {"teacher_prompt_template": {"question", "reference"}, "reference_prompt_template": {"reference"}}
    for name, placeholders in expected.items():
        found = set(_PLACEHOLDER.findall(getattr(args, name)))
        optional = {"images"} - placeholders if name == "reference_prompt_template" else set()
        if found - optional != placeholders:
            wanted = " and ".join(f"{{{p}}}" for p in sorted(placeholders))
            got = " and ".join(f"{{{p}}}" for p in sorted(found)) or "none"
            raise InputError(f"`{name}` must hold the placeholders {wanted} and no other, but it holds {got}.")


def check_combinations(args: Any) -> None:
    """Refuses settings that exclude each other."""
    if not args.reference_column.strip():
        raise InputError("`reference_column` must be the name of a column, got an empty one.")
    check_markers(args.epistemic_markers)
    if args.target == "contrastive" and args.reference_source != "own":
        raise InputError(
            f"`target: contrastive` needs the row's own reference beside the wrong one, not "
            f"`reference_source: {args.reference_source}`. Remove one of the two keys."
        )
    if args.teacher_model_kind != "base" and args.teacher_model_name_or_path is not None:
        raise InputError(
            f"`teacher_model_kind: {args.teacher_model_kind}` makes the student its own teacher and cannot be "
            "combined with `teacher_model_name_or_path`. Remove one of the two keys."
        )


def check_servers(args: Any) -> None:
    """Checks the settings of rollouts from servers; TRL reads one address as text."""
    if args.vllm_adapter_sync and not args.use_vllm:
        raise InputError("`vllm_adapter_sync` needs `use_vllm: true`.")
    if args.vllm_adapter_sync and args.vllm_mode == "colocate" and args.vllm_enable_sleep_mode:
        raise InputError(
            "`vllm_adapter_sync` with `vllm_mode: colocate` needs `vllm_enable_sleep_mode: false`: asleep, vLLM "
            "throws the base weights away, and only the adapter is sent again."
        )
    if args.rollouts_ahead and not (args.vllm_adapter_sync and args.vllm_mode == "server"):
        raise InputError(
            "`rollouts_ahead` needs a server that holds versions: set `vllm_mode: server` and "
            "`vllm_adapter_sync: true`."
        )
    if args.rollouts_ahead and args.loss_type == "sampled_token":
        raise InputError(
            "`loss_type: sampled_token` weights tokens as if the present student had sampled them, which rollouts "
            "ahead are not. Set `loss_type: divergence` or `rollouts_ahead: 0`."
        )
    urls = args.vllm_server_base_url
    if urls is not None and not (urls and all(re.match("https?://.", url) for url in urls)):
        raise InputError(f"`vllm_server_base_url` must be of the form http://host:port, got {urls}.")
    if urls is not None and not args.vllm_adapter_sync:
        if len(urls) != 1:
            raise InputError(f"`vllm_server_base_url` must be one address without `vllm_adapter_sync`, got {urls}.")
        args.vllm_server_base_url = urls[0]


def infer_device(args: Any) -> None:
    """Sets `use_cpu` where there is nothing else; refuses bf16 on a device without it."""
    if args.use_cpu or is_torch_xla_available():
        return
    if not torch.accelerator.is_available():
        args.use_cpu = True
        if os.environ.get("LOCAL_RANK", "0") == "0":
            logger.warning("There is no accelerator: training runs on the CPU (`use_cpu: true`).")
    elif (args.bf16_full_eval or args.bf16 or (args.bf16 is None and not args.fp16)) and (
        not is_torch_bf16_gpu_available()
    ):
        raise InputError(
            "`bf16` is the default, but this device does not support it. Set `bf16: false`, or `fp16: true` as "
            "well for half precision."
        )
