"""Every shipped accelerate config, read by accelerate itself."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from .worlds import ROOT


FOLDER = ROOT / "recipes" / "accelerate_configs"
# name -> processes, machines, ZeRO stage, device of offloaded parameters
EXPECTED = {
    "cpu": (2, 1, None, None),
    "single": (1, 1, None, None),
    "ddp": (8, 1, None, None),
    "zero1": (8, 1, 1, "none"),
    "zero2": (8, 1, 2, "none"),
    "zero3": (8, 1, 3, "none"),
    "zero3_offload": (8, 1, 3, "cpu"),
    "zero3_2nodes": (16, 2, 3, "none"),
    "fsdp2": (8, 1, None, None),
}


def test_every_file_is_expected() -> None:
    assert {file.stem for file in FOLDER.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it_as_meant(name: str) -> None:
    file = FOLDER / f"{name}.yaml"
    processes, machines, stage, offload = EXPECTED[name]
    config = load_config_from_file(str(file))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.use_deepspeed == (stage is not None)
    assert arguments.use_fsdp == (name == "fsdp2")
    assert arguments.multi_gpu == (name in ("cpu", "ddp"))
    assert arguments.mixed_precision == ("no" if name == "cpu" else "bf16")
    assert bool(arguments.use_cpu) == (name == "cpu")
    if stage is not None:
        assert (int(arguments.zero_stage), arguments.offload_param_device) == (stage, offload)
        assert arguments.offload_optimizer_device == offload
        if stage == 3:  # otherwise the saved weights are empty
            assert str(arguments.zero3_save_16bit_model).lower() == "true"
            assert str(arguments.zero3_init_flag).lower() == "true"
    if name == "fsdp2":
        assert int(arguments.fsdp_version) == 2
        assert arguments.fsdp_state_dict_type == "FULL_STATE_DICT"  # otherwise `save_model` writes no weights


@pytest.mark.parametrize("name", EXPECTED)
def test_the_first_line_names_the_hardware(name: str) -> None:
    first = Path(FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ") and ("GPU" in first or "CPU" in first or "nodes" in first)
