"""
Build the paper's training data as JSON lines with the columns `prompt` and `reference`, and print its checksum.

    python recipes/build_data.py dasd                                    # outputs/data/dasd_10k.jsonl
    python recipes/build_data.py mathcot --dataset <hub id or folder>    # outputs/data/math_cot_20k.jsonl

DASD-10K is a subset of 10,000 rows. The paper publishes neither the rows nor how they were drawn, so the stage, the
domain, the seed, and the reference without the thinking before it are our choices. Each is an option. The rows with
the smallest SHA-256 of seed, prompt and reference are taken, in that order, so the file does not depend on the order
or the files in which the rows come. `--revision` pins what the hub serves.
"""

import argparse
import hashlib
import heapq
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset


@dataclass(frozen=True)
class Source:
    """
    Location of a dataset and the columns that are read.

    Attributes:
        title (`str`): name in the paper.
        file_name (`str`): file to write.
        dataset (`str`, *optional*): hub id. `None`: the paper names none, so `--dataset` is required.
        config (`str`, *optional*): configuration on the hub.
        prompt, reference (`str`): columns.
        domain (`str`, *optional*): value of the column `domain` to keep.
        size (`int`, *optional*): rows to take. `None` takes all.
    """

    title: str
    file_name: str
    dataset: str | None
    config: str | None
    prompt: str
    reference: str
    domain: str | None
    size: int | None


SOURCES = {
    "dasd": Source(
        title="DASD-10K",
        file_name="dasd_10k.jsonl",
        dataset="Alibaba-Apsara/Superior-Reasoning-SFT-gpt-oss-120b",
        config="stage1",
        prompt="input",
        reference="output",
        domain="math",
        size=10_000,
    ),
    "mathcot": Source(
        title="Math-CoT-20K",
        file_name="math_cot_20k.jsonl",
        dataset=None,
        config=None,
        prompt="question",
        reference="response",
        domain=None,
        size=None,
    ),
}
NO_DATASET = (
    "{title} needs `--dataset`: the paper gives no hub id, and none could be confirmed. On the hub, "
    "`jasonrqh/Math-CoT-20k` has its name and size (20,480 competition problems; columns `question` and `response`). "
    "Or give a folder of JSON lines or Parquet files, with `--prompt_column` and `--reference_column`."
)


def reference_of(text: str, keep: str) -> str:
    """The worked solution in an answer: the complete text (`full`), or what follows the thinking (`solution`)."""
    return (text if keep == "full" else text.rsplit("</think>", 1)[-1]).strip()


def pairs(rows: Iterable[dict[str, Any]], args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Prompt and reference of every row of the selected domain that has both."""
    for index, row in enumerate(rows):
        wanted = (args.prompt_column, args.reference_column, *(["domain"] if args.domain else []))
        missing = [column for column in wanted if column not in row]
        if missing:
            sys.exit(
                f"error: row {index} of {args.dataset} has no column `{missing[0]}`; it has "
                f"{', '.join(f'`{column}`' for column in row)}. Set `--prompt_column`, `--reference_column`, or "
                "`--domain all`."
            )
        prompt, answer = row[args.prompt_column], row[args.reference_column]
        if args.domain and row["domain"] != args.domain:
            continue
        if prompt and answer and prompt.strip() and reference_of(answer, args.reference):
            yield prompt.strip(), reference_of(answer, args.reference)


def choose(rows: Iterable[tuple[str, str]], size: int | None, seed: int) -> list[tuple[str, str]]:
    """The `size` rows with the smallest hashes, sorted by hash; never holds more rows in memory."""

    def rank(row: tuple[str, str]) -> bytes:
        return hashlib.sha256("\0".join([str(seed), *row]).encode()).digest()

    return sorted(rows, key=rank) if size is None else heapq.nsmallest(size, rows, key=rank)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write the paper's training data as JSON lines; print the checksum.")
    add = parser.add_argument
    add("data", choices=list(SOURCES))
    add("--dataset", help="Hub id or local folder.")
    add("--revision", help="Commit of the dataset on the hub.")
    add("--config", help="Configuration of the dataset on the hub; folders have none.")
    add("--prompt_column")
    add("--reference_column")
    add("--domain", help="Value of the column `domain` to keep; `all` keeps every row.")
    add(
        "--reference",
        choices=["solution", "full"],
        default="solution",
        help="`full` keeps the thinking in the reference.",
    )
    add("--size", type=int, help="Number of rows to take.")
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="File to write.")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    source = SOURCES[args.data]
    args.dataset = args.dataset or source.dataset
    if args.dataset is None:
        sys.exit("error: " + NO_DATASET.format(title=source.title))
    is_local = Path(args.dataset).is_dir()
    args.prompt_column = args.prompt_column or source.prompt
    args.reference_column = args.reference_column or source.reference
    args.domain = {None: source.domain, "all": None}.get(args.domain, args.domain)
    size = args.size or source.size
    output = args.output or Path("outputs/data", source.file_name)
    try:
        rows = load_dataset(
            args.dataset,
            name=None if is_local else args.config or source.config,
            revision=args.revision,
            split="train",
            streaming=True,  # one pass that keeps only the rows taken
        )
    except Exception as error:  # offline, renamed, gated or empty: these share no exception type
        sys.exit(f"error: `--dataset`: {args.dataset} cannot be loaded: {error}")
    chosen = choose(pairs(rows, args), size, args.seed)
    if len(chosen) < (size or 1):
        kind = f"rows of the domain `{args.domain}`" if args.domain else "rows"
        sys.exit(
            f"error: {args.dataset} has {len(chosen)} usable {kind}, but {size or 1} are needed. Lower `--size`, or "
            "keep every domain with `--domain all`."
        )
    lines = (json.dumps({"prompt": p, "reference": r}, ensure_ascii=False) + "\n" for p, r in chosen)
    text = "".join(lines).encode()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(text)
    print(f"{source.title}: {len(chosen)} rows in {output}")
    print(f"sha256: {hashlib.sha256(text).hexdigest()}")


if __name__ == "__main__":
    main()
