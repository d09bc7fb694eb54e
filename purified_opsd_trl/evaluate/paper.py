"""Table 1 of arXiv 2607.02234, to show beside your own numbers: 12 runs each, best checkpoint."""

_BENCHMARKS = ("aime24", "aime25", "hmmt25", "average")

# model -> (method, training data) -> AIME 2024, AIME 2025, HMMT February 2025, average
_TABLE_1: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "qwen3-8b": {
        "base": (75.8, 65.6, 43.9, 61.8),
        "OPSD, DASD-10K": (75.4, 65.2, 42.2, 60.9),
        "purified, DASD-10K": (79.4, 71.9, 46.7, 66.0),
        "OPSD, Math-CoT-20K": (75.8, 66.7, 44.4, 62.3),
        "purified, Math-CoT-20K": (77.1, 70.8, 47.5, 65.1),
    },
    "qwen3-4b": {
        "base": (74.9, 66.4, 42.2, 61.2),
        "OPSD, DASD-10K": (74.2, 65.2, 42.2, 60.5),
        "purified, DASD-10K": (76.3, 68.3, 46.4, 63.7),
        "OPSD, Math-CoT-20K": (73.3, 64.2, 40.8, 59.4),
        "purified, Math-CoT-20K": (76.1, 67.5, 44.4, 62.7),
    },
    "deepseek-r1-distill-qwen-7b": {
        "base": (52.0, 39.6, 24.4, 38.7),
        "OPSD, DASD-10K": (51.9, 39.2, 24.4, 38.5),
        "purified, DASD-10K": (54.0, 43.1, 25.3, 40.8),
        "OPSD, Math-CoT-20K": (52.2, 38.1, 24.4, 38.2),
        "purified, Math-CoT-20K": (55.3, 41.1, 26.1, 40.8),
    },
    "olmo-3-7b-think": {
        "base": (71.9, 66.7, 45.2, 61.3),
        "OPSD, DASD-10K": (68.1, 66.4, 45.0, 59.8),
        "purified, DASD-10K": (74.7, 68.9, 46.1, 63.2),
        "OPSD, Math-CoT-20K": (69.7, 65.6, 41.7, 59.0),
        "purified, Math-CoT-20K": (73.3, 70.3, 46.4, 63.3),
    },
}


def paper_rows(model: str, benchmarks: list[str]) -> dict[str, dict[str, float]]:
    """
    The paper's percentages for a model, by method and benchmark; empty where the paper has no such model.

    Of `model`, an id or a path, the last part counts. The paper's average is shown for exactly its three benchmarks.
    """
    rows = _TABLE_1.get(model.rstrip("/").split("/")[-1].lower(), {})
    shown = {*benchmarks, *(["average"] if set(benchmarks) == set(_BENCHMARKS[:3]) else [])}
    return {
        name: {b: score for b, score in zip(_BENCHMARKS, scores, strict=True) if b in shown}
        for name, scores in rows.items()
        if shown & set(_BENCHMARKS)
    }
