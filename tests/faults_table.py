"""
Plugin of `make test-faults`: runs the tests of the fault table and those marked `faults`, and prints the table of
what they showed.

    python -m pytest -p tests.faults_table -m "not vllm" tests
"""

import re
from collections import Counter
from typing import Any

import pytest


# test -> fault, what is lost
FAULTS = {
    "test_a_run_stopped_in_the_second_and_third_epoch_goes_on_exactly": (
        "stopped in epoch 2, between 2 and 3, in 3; full, LoRA, moving average, stream",
        "nothing after the last checkpoint",
    ),
    "test_killed_at_random_points": ("SIGKILL at random times; the same four", "nothing after the last checkpoint"),
    "test_two_processes_killed_at_random_points_of_three_epochs": (
        "SIGKILL of two processes at random times (DDP, ZeRO-1, ZeRO-2, ZeRO-3, FSDP2)",
        "nothing after the last checkpoint",
    ),
    "test_resuming_in_the_middle_of_the_second_epoch_is_exact": (
        "two processes stopped in epoch 2 of 3 (the same five)",
        "nothing after the last checkpoint",
    ),
    "test_another_number_of_processes_is_refused": ("another number of processes: refused (the same five)", "nothing"),
    "test_one_process_whose_loss_is_not_finite_stops_all": ("NaN on one of two processes (the same five)", "nothing"),
    "test_a_signal_in_a_step_saves_it_and_a_full_disk_keeps_the_one_before": (
        "SIGTERM in a step, then a disk that is full while a checkpoint is written",
        "the checkpoint that did not fit",
    ),
    "test_a_full_and_a_read_only_file_system": (
        "a full, then a read-only file system",
        "the checkpoint that did not fit",
    ),
    "test_a_signal_to_the_command_reaches_every_process": ("SIGTERM, SIGINT, SIGHUP to the command", "nothing"),
    "test_a_second_signal_stops_at_once": ("a second signal in a step that hangs", "the running step"),
    "test_a_signal_to_one_process_stops_all_after_one_step": (
        "SIGTERM to one of two processes (the same five)",
        "nothing",
    ),
    "test_a_killed_job_goes_on_from_the_last_complete_checkpoint": (
        "SIGKILL of one of two processes in a step, or while a checkpoint is written (the same five)",
        "that checkpoint",
    ),
    "test_the_others_end_when_a_process_dies": (
        "SIGKILL of one of two processes in a step: the other ends",
        "nothing after the last checkpoint",
    ),
    "test_a_damaged_checkpoint_falls_back_to_the_one_before": (
        "a file of the newest checkpoint missing, cut short or overwritten",
        "that checkpoint",
    ),
    "test_a_second_process_is_turned_away": ("a second process in the folder", "nothing"),
    "test_rotation_goes_by_step_and_keeps_what_is_of_others": ("the clock set back", "nothing"),
    "test_training_stops_before_an_update_that_is_not_finite": (
        "NaN from a custom target or in one row, infinity in the teacher's head, NaN gradient",
        "nothing",
    ),
    "test_weights_that_an_update_made_infinite_are_not_saved": ("an update too large for the weights", "that update"),
    "test_rows_are_divided_and_go_to_the_servers_that_are_left": ("one of two rollout servers dies", "nothing"),
    "test_without_any_server_what_was_trained_is_saved": ("the last rollout server dies", "nothing"),
    "test_a_slow_server_counts_as_lost": ("a rollout server does not answer in time", "nothing"),
    "test_an_answer_that_is_none": ("a rollout server answers nonsense", "nothing"),
    "test_a_resumed_run_equals_an_uninterrupted_one": (
        "stopped with rollouts under way, 0, 1 and 3 batches ahead",
        "nothing after the last checkpoint",
    ),
    "test_training_goes_on_without_the_server_of_wandb": (
        "wandb cannot be reached",
        "nothing; its run is kept offline",
    ),
}
TRIES: Counter[str] = Counter()
SURVIVED: Counter[str] = Counter()


def name_of(nodeid: str) -> str:
    return re.sub(r"\[.*", "", nodeid.rsplit("::", 1)[-1])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if name_of(item.nodeid) in FAULTS or item.get_closest_marker("faults")]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and not report.skipped:
        tries = int(dict(report.user_properties).get("tries", 1))  # type: ignore[arg-type]
        TRIES[name_of(report.nodeid)] += tries
        SURVIVED[name_of(report.nodeid)] += tries * report.passed


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("faults")
    lines = ["| fault | tries | survived | lost | test |", "|---|---|---|---|---|"]
    for name, (fault, lost) in FAULTS.items():
        tried = f"{TRIES[name]} | {SURVIVED[name]}" if TRIES[name] else "not run | "
        lines.append(f"| {fault} | {tried} | {lost} | `{name}` |")
    terminalreporter.write_line("\n".join(lines))
