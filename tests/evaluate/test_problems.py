"""Benchmarks, prompts and answers."""

from pathlib import Path
from typing import Any

import pytest

from purified_opsd_trl import InputError
from purified_opsd_trl.evaluate.answers import final_text, grade
from purified_opsd_trl.evaluate.arguments import EvaluateArguments
from purified_opsd_trl.evaluate.benchmarks import Problem, load_benchmark, load_benchmarks
from purified_opsd_trl.evaluate.run import Prompter


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"problem": "p"}\n', "row 0: the field `answer` is missing.*`problem`"),
        ('{"problem": " ", "answer": "1"}\n', "row 0: the field `problem` is missing or empty"),
        ('{"problem": "p", "answer": "1"}\n{oops\n', "line 2: not JSON"),
        ('{"id": 1, "problem": "p", "answer": "1"}\n' * 2, "holds the id '1' twice"),
        ("", "holds no problems"),
    ],
)
def test_bad_benchmarks_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_benchmark(str(path))


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes('{"problem": "p", "answer": "1"}\n{"problem": "é", "answer": "2"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match="line 2: not JSON"):
        load_benchmark(str(path))


def test_unknown_benchmarks_name_the_presets() -> None:
    with pytest.raises(InputError, match="no preset `aime26`. Presets are aime24, aime25, hmmt25"):
        load_benchmark("aime26")


def test_two_benchmarks_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a/b.jsonl", "c/b.jsonl", "aime24.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"problem": "p", "answer": "1"}\n')
    files = [str(tmp_path / name) for name in ("a/b.jsonl", "c/b.jsonl", "aime24.jsonl")]
    for names in (files[:2], ["aime24", files[2]], [files[0], files[0]]):
        with pytest.raises(InputError, match=f"`{names[0]}` and `{names[1]}` are both called `(b|aime24)`.*Rename"):
            load_benchmarks(names)
    assert [b.name for b in load_benchmarks(files[1:])] == ["b", "aime24"]


HUGE = "\\binom{20000}{10000}"


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        ("so the answer is \\boxed{204}.", "204", True),
        ("\\boxed{0.5}", "\\frac{1}{2}", True),
        ("\\boxed{\\dfrac{\\sqrt{2}}{2}}", "\\frac{1}{\\sqrt{2}}", True),
        ("\\boxed{25}", "025", True),
        ("\\boxed{26}", "025", False),
        (f"\\boxed{{{HUGE}}}", "5", False),  # more digits than Python spells
        (f"\\boxed{{{HUGE}}}", HUGE, True),
        ("<think>\\boxed{25}</think> It is \\boxed{26}.", "25", False),
        ("<think>It could be \\boxed{25}", "25", False),
        ("", "25", False),
    ],
)
def test_grades(completion: str, answer: str, correct: bool) -> None:
    assert grade(completion, answer).correct is correct


def test_what_cannot_be_graded_is_wrong_with_a_reason() -> None:
    failed = grade(f"\\boxed{{{HUGE}+x}}", "x")
    assert not failed.correct and failed.ungradable is not None and "Exceeds the limit" in failed.ungradable
    endless = grade("\\boxed{9^{9^{9}}}", "5")
    assert not endless.correct and endless.ungradable == "TimeoutException: Timeout during comparison"
    assert grade("\\boxed{4}", "5").ungradable is None is grade("", "5").ungradable


def test_numbers_in_open_thinking_are_no_answer() -> None:
    assert final_text("7 or 8", thinking_open=True) == ""
    assert final_text("7 or 8</think>9", thinking_open=True) == "9"
    assert grade("perhaps 25", "25", thinking_open=True).answer is None


def test_thinking_mode_reaches_the_template(make_tokenizer: Any) -> None:
    problem = Problem("0", "What is 1 + 1?", "2")
    tokenizer = make_tokenizer("qwen3")
    texts = {}
    for mode in ("on", "off"):
        args = EvaluateArguments(model_name_or_path="m", benchmarks=["b"], thinking=mode)
        texts[mode] = Prompter(tokenizer, args).text(problem)
    assert texts["off"].endswith("<think>\n\n</think>\n\n") and not texts["on"].endswith("</think>\n\n")


def test_a_base_model_needs_the_flag_for_plain_text(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(None)
    with pytest.raises(InputError, match="has no chat template.*set `text_prompts`"):
        Prompter(tokenizer, EvaluateArguments(model_name_or_path="m", benchmarks=["b"]))
    plain = Prompter(tokenizer, EvaluateArguments(model_name_or_path="m", benchmarks=["b"], text_prompts=True))
    assert plain.text(Problem("0", "x", "2")).startswith("x\n\nPlease")
