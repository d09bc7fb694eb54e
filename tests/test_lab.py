"""The lab: its task by hand, its stale sampler, and a convergence test with the package's own trainer."""

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from purified_opsd_trl import PurifiedOPSDConfig
from recipes.lab.figure import COLORS, COLUMNS, NAMES, PANELS, RESULTS, draw, load, setting, spread, table
from recipes.lab.grid import full
from recipes.lab.run import Run, distil, save
from recipes.lab.stale import StaleRolloutTrainer
from recipes.lab.targets import expectations
from recipes.lab.task import Counts, Habits, Problem, count, sample_problem, write_response


BASE = Path(__file__).parent / "fixtures" / "lab_base"  # base model 0 of the style world, in fp16
PROBLEM = Problem(7, 4, ("+1", "-2", "+3", "*2"))  # 4 -> 5 -> 3 -> 6 -> 5


def test_problem_by_hand() -> None:
    assert PROBLEM.question == "<q> 4 A +1 B -2 C +3 D *2 </q>"
    assert PROBLEM.values == [5, 3, 6, 5]
    assert PROBLEM.reference(rich=False) == "5"
    assert PROBLEM.reference(rich=True) == "3 5 6 ; 5"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (
            "4 A 5 ; 5 B 3 ; 3 C 6 wait 3 C 6 ; 6 D 5 ; ans 5 <eos>",
            Counts(responses=1, correct=1, waits=1, right=5, right_waits=1, tokens=23),
        ),
        (  # the error at B is repaired at the second try; the one at D stays
            "4 A 5 ; 5 B 4 wait 5 B 3 ; 3 C 6 ; 6 D 0 ; ans 0 <eos>",
            Counts(responses=1, waits=1, right=3, wrong=2, wrong_waits=1, repaired=1, tokens=23),
        ),
        ("4 A 5 ; ans 5 <eos>", Counts(responses=1, correct=1, jumps=1, right=1, tokens=7)),
        ("4 A 5 ; 5 B", Counts(responses=1, right=1, tokens=6)),
    ],
)
def test_counts_by_hand(response: str, expected: Counts) -> None:
    assert count(PROBLEM, response) == expected


def test_habits_are_what_is_counted() -> None:
    rng = random.Random(0)
    habits = Habits(wrong=0.2, wait_right=0.25, wait_wrong=0.6)
    problems = [sample_problem(rng, 7) for _ in range(2000)]
    rates = sum((count(p, write_response(p, habits, rng)) for p in problems), Counts()).rates()
    assert rates["error_rate"] == pytest.approx(0.2, abs=0.02)
    assert rates["wait_given_right"] == pytest.approx(0.25, abs=0.02)
    assert rates["wait_given_wrong"] == pytest.approx(0.6, abs=0.04)
    assert rates["jumps"] == 0.0


def test_a_rate_without_an_occasion_is_missing_not_zero() -> None:
    rates = Counts(responses=2, right=3, tokens=8).rates()
    assert (rates["error_rate"], rates["wait_given_right"]) == (0.0, 0.0)
    assert rates["wait_given_wrong"] is None and rates["repaired_given_wait"] is None
    assert spread([None, 0.5, None]) == "0.50" and spread([None]) == "-"
    assert spread([0.25, None, 0.75]) == "0.50 ± 0.35"


def test_slips_forget_the_operation() -> None:
    slips = Habits(wrong=1.0, wait_right=0.0, wait_wrong=0.0, slips=True)
    assert write_response(PROBLEM, slips, random.Random(0)) == "4 A 4 ; 4 B 4 ; 4 C 4 ; 4 D 4 ; ans 4"


def test_problems_of_evaluation_are_held_out() -> None:
    rng = random.Random(0)
    train = {sample_problem(rng, 2).question for _ in range(500)}  # modulus 2: few problems, so all are seen
    held_out = {sample_problem(rng, 2, held_out=True).question for _ in range(500)}
    assert held_out and train and not held_out & train


def test_consulting_the_reference_leaves_only_errors_it_cannot_show() -> None:
    assert [PROBLEM.contradicts("A", result, rich=True) for result in range(7)] == [1, 1, 1, 0, 1, 0, 0]
    assert not any(PROBLEM.contradicts("A", result, rich=False) for result in range(7))
    assert [PROBLEM.contradicts("D", result, rich=False) for result in range(7)] == [1, 1, 1, 1, 1, 0, 1]
    other = Problem(7, 4, ("+1", "-2", "+3", "+3"))  # 5 3 6, answer 2: the answer is no value before it
    assert other.contradicts("A", 2, rich=True)
    rng = random.Random(0)
    always_wrong = Habits(wrong=1.0, wait_right=0.0, wait_wrong=0.0)
    first = [int(write_response(PROBLEM, always_wrong, rng, consults=True).split()[2]) for _ in range(300)]
    assert set(first) == {3, 5, 6}  # put right, or another value of the reference
    assert first.count(5) / 300 == pytest.approx(4 / 6, abs=0.1)


def test_expectations_are_those_of_the_definition() -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    contexts = [f"{PROBLEM.question}", f"{PROBLEM.question} <r> 5 </r>", "<r> 5 </r>"]
    with torch.no_grad():  # after "4 A" comes 5, or 4 if the operation is forgotten
        prompts = [tokenizer(f"{context} 4 A", return_tensors="pt")["input_ids"] for context in contexts]
        base, teacher, probe = (model(input_ids=ids).logits[0, -1].softmax(-1) for ids in prompts)
    target = base * teacher / probe
    target /= target.sum()
    found = expectations(BASE, [PROBLEM], pmi_clip=1e6)
    right, forgotten = tokenizer.convert_tokens_to_ids(["5", "4"])
    for name, p in (("base", base), ("teacher", teacher), ("reference only", probe), ("target", target)):
        assert found["A"][name] == pytest.approx((p[right].item(), p[forgotten].item()), rel=1e-4)
    assert list(found) == list("ABCD")
    flat = expectations(BASE, [PROBLEM], pmi_beta=1e6)
    assert flat["D"]["target"] == pytest.approx(flat["D"]["base"], rel=1e-4)


@pytest.mark.parametrize("lag", [0, 2])
def test_stale_rollouts_come_from_old_weights(lag: int, tmp_path: Path) -> None:
    sampled: list[torch.Tensor] = []
    own: list[torch.Tensor] = []

    present: list[list[torch.Tensor]] = []  # all weights at each step, and the batch that others wrote
    batches: list[dict[str, Any]] = []

    class Recorder(StaleRolloutTrainer):
        generating = False

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            present.append([parameter.detach().clone() for parameter in self.model.parameters()])
            self.generating = True
            try:
                return super()._generate_single_turn(*args, **kwargs)
            finally:
                self.generating = False

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            batches.append(super()._generate_and_score_completions(inputs))
            return batches[-1]

        def _load(self, weights: list[torch.Tensor]) -> None:
            if self.generating:
                (own if len(own) < len(sampled) else sampled).append(weights[0].clone())
            super()._load(weights)

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    args = PurifiedOPSDConfig(
        output_dir=str(tmp_path),
        teacher_prompt_template="{question} <r> {reference} </r>",
        reference_prompt_template="<r> {reference} </r>",
        max_completion_length=8,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        decomposition_steps=0,
    )
    data = Dataset.from_list([{"prompt": PROBLEM.question, "reference": PROBLEM.reference(False)}] * 4)
    trainer = Recorder(
        lag=lag,
        model=model,
        args=args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(BASE),
    )
    trainer.train()
    assert len(sampled) == len(own) == 4
    for step in range(4):
        assert torch.equal(sampled[step], own[max(0, step - lag)])
        assert step == 0 or not torch.equal(own[step], own[step - 1])
    expected = [divergence(present[step], present[max(0, step - lag)], batches[step]) for step in range(4)]
    assert trainer.distances == pytest.approx(expected if lag else [], abs=1e-6)
    assert not lag or expected[-1] > 1e-4


@torch.no_grad()
def divergence(now: list[torch.Tensor], wrote: list[torch.Tensor], batch: dict[str, Any]) -> float:
    """Mean `KL(now || wrote)` of the written tokens, one completion after the other, without padding."""
    log_probs, model = [], AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    for weights in (now, wrote):
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)
        rows = []
        for i in range(len(batch["prompt_ids"])):
            parts = [batch[f"{part}_ids"][i][batch[f"{part}_mask"][i].bool()] for part in ("prompt", "completion")]
            logits = model(torch.cat(parts)[None]).logits[0, len(parts[0]) - 1 : -1]
            rows.append(logits.double().log_softmax(-1))
        log_probs.append(torch.cat(rows))
    terms = torch.nn.functional.kl_div(log_probs[1], log_probs[0], reduction="sum", log_target=True)
    return float(terms) / len(log_probs[0])


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """A shortened run of each target."""
    return {
        target: distil(Run(target=target, steps=STEPS, eval_every=STEPS), BASE, eval_problems=256)
        for target in ("teacher", "purified")
    }


STEPS = 25


@pytest.mark.slow
def test_purified_keeps_accuracy_and_waits_where_opsd_loses_them(results: dict[str, dict[str, Any]]) -> None:
    before, opsd = (results["teacher"]["curve"][i]["sampled"] for i in (0, -1))
    purified = results["purified"]["curve"][-1]["sampled"]
    print(before, opsd, purified)
    assert opsd["waits"] < 0.5 * before["waits"] < purified["waits"]
    assert opsd["accuracy"] < before["accuracy"] - 0.15
    assert purified["accuracy"] > before["accuracy"] + 0.1  # 0.43, 0.13 and 0.73 where this was written


def test_results_are_appended_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    assert load(path) == []
    runs = [Run(world="style", seed=1), Run(world="repair"), Run(world="style")]
    for number, run in enumerate(runs):
        save({"run": asdict(run), "seconds": number, "curve": [{"step": 0, "sampled": {"waits": 0.123456}}]}, path)
    assert [result["seconds"] for result in load(path)] == [1, 2, 0]  # by name: repair first
    assert load(path)[0]["curve"] == [{"step": 0, "sampled": {"waits": 0.1235}}]


# Runs of the grid without a result yet; docs/lab.md says so. `make lab ARGS=--full` runs them
NOT_RUN = (
    *(f"{world}-contrastive-s{seed}-r0" for world in ("style", "repair") for seed in range(3)),
    *(f"style-interpolated-s{seed}-r0" for seed in (1, 2)),
    *(f"repair-interpolated-s{seed}-r0" for seed in range(3)),
    "repair-gated-s2-r0",
)


def test_the_committed_results_are_those_of_the_grid() -> None:
    names = [Run(**result["run"]).name for result in load(RESULTS)]
    assert sorted([*names, *NOT_RUN]) == sorted({run.name for run in full()}) and len(names) + len(NOT_RUN) == 93


@pytest.mark.parametrize(
    ("section", "world", "model", "row"),
    [
        ("style world", "style", "teacher", "OPSD"),
        ("style world", "style", "purified", "purified OPSD"),
        ("repair world", "repair", "teacher", "OPSD"),
        ("repair world", "repair", "purified", "purified"),
        ("style world", "style", "gated", "gated"),
        ("repair world", "repair", "gated", "gated"),
        ("style world", "style", "interpolated", "interpolated"),
    ],
)
def test_the_page_shows_the_committed_results(section: str, world: str, model: str, row: str) -> None:
    page = (Path(__file__).parent.parent / "docs" / "lab.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in page.split(f"| {section} |")[1].splitlines()]
    found = [
        result
        for result in load(RESULTS)
        if setting(result["run"]) == f"{world}, answer only" and result["run"]["target"] == model
    ]
    ends = [result["curve"][-1] for result in found]
    columns = [("sampled", "accuracy"), ("greedy", "accuracy"), ("sampled", "waits")]
    expected = [spread([end[decoding][key] for end in ends]) for decoding, key in columns]
    bases = {result["run"]["seed"] for result in found}
    count = f"{len(bases)} x {len(found) // len(bases)}"
    assert next(line for line in lines if line[0] == row)[1:5] == [count, *expected]


def point(step: int, rate: float) -> dict[str, Any]:
    """A point of a curve whose sampled rates are all `rate`, and the greedy ones 0.1 more."""
    rates = {key: rate for _, _, key, _ in COLUMNS}
    return {"step": step, "sampled": rates, "greedy": {key: rate + 0.1 for key in rates}}


def test_table_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {"teacher": (0.1, 0.3), "purified": (0.7, 0.5)}  # of two runs; the base is at 0.4
    results = [
        {"run": asdict(Run(target=target, repeat=repeat)), "curve": [point(0, 0.4), point(25, end)]}
        for target, values in ends.items()
        for repeat, end in enumerate(values)
    ]
    rows = [row.strip("| ").split(" | ") for row in table(results).splitlines()[2:]]
    assert [row[1:5] for row in rows] == [
        ["base", "1 x 1", "0.400", "0.500"],
        ["OPSD", "1 x 2", "0.200 ± 0.141", "0.300 ± 0.141"],
        ["purified OPSD", "1 x 2", "0.600 ± 0.141", "0.700 ± 0.141"],
    ]

    plt = pytest.importorskip("matplotlib.pyplot", reason="the extra `plot` is not installed")
    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)
    draw(results, tmp_path / "lab.png")
    for axis, (decoding, _, title) in zip(figures[0].axes, PANELS, strict=True):
        above = 0.1 if decoding == "greedy" else 0.0
        assert axis.get_title() == title
        lines = {line.get_label(): line.get_ydata() for line in axis.lines}
        assert lines[NAMES["base"]] == pytest.approx([0.4 + above] * 2)
        assert lines[NAMES["teacher"]] == pytest.approx([0.4 + above, 0.2 + above])
        assert lines[NAMES["purified"]] == pytest.approx([0.4 + above, 0.6 + above])
    pixels = (255 * plt.imread(tmp_path / "lab.png")[..., :3]).round().astype(int)
    for color in (COLORS["teacher"], COLORS["purified"]):  # the file shows both curves, three pixels wide
        assert (pixels == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).any()
