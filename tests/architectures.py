"""
Every causal language model of the installed transformers at toy size, and what is exact about it.

`python -m tests.architectures` measures all of them and rewrites the table of docs/models.md.
"""

import inspect
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from purified_opsd_trl import LMHead, PurifiedOPSDConfig, PurifiedOPSDTrainer
from purified_opsd_trl.backbone import last_hidden_states, runs_rows_apart
from purified_opsd_trl.deviations import LONG, deviations, tolerance
from purified_opsd_trl.errors import InputError
from tests.conftest import build_tokenizer


VOCAB = 300  # beyond the ids of the tests' tokenizer

# Sizes by the names that families give them; only fields that a configuration has are set
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "dim_model", "embed_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "moe_intermediate_size", "n_inner", "dim_ff"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size", "decoder_ffn_dim", "ffn_dim", "shared_intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "global_head_dim", "swa_head_dim", "dim_head"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **{"vocab_size": VOCAB, "initializer_range": 0.3, "init_std": 0.3, "pad_token_id": 0, "bos_token_id": 1},
    **{"eos_token_id": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 8, "qk_head_dim": 16, "n_shared_experts": 1, "first_k_dense_replace": 1, "dropout": 0.0},
    **{"sliding_window": 16, "is_decoder": True, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 512},
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout_prob"), 0.0),
    **dict.fromkeys(("attention_probs_dropout_prob", "activation_dropout", "hidden_dropout", "resid_dropout"), 0.0),
}

_MLA = {"num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1}

# What the sizes above do not make consistent
FIELDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _MLA),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), _MLA),
    **dict.fromkeys(("bamba", "granitemoehybrid", "falcon_h1"), {**_MAMBA, "mamba_d_ssm": 64}),
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 8},
    "reformer": {"axial_pos_embds": False, "is_decoder": True},
    "rembert": {"output_embedding_size": 32, "input_embedding_size": 32},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": {
        "vocab_size_per_layer_input": VOCAB,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
    },
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "zamba": {"layer_types": ["mamba", "hybrid"]},
    "gemma4": {"text_config": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}},
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    "modernbert-decoder": {"local_attention": 16},
}


def toy_config(family: str) -> PretrainedConfig:
    default = AutoConfig.for_model(family)
    return _shrunk(default, FIELDS.get(family, {}))


def _shrunk(config: PretrainedConfig, fields: dict[str, Any]) -> PretrainedConfig:
    values = {}
    present = set(inspect.signature(type(config).__init__).parameters) | set(config.to_dict())
    for name, value in SIZES.items():
        if name in present or name in config.attribute_map:
            values[name] = int(value) if value == 0 and isinstance(getattr(config, name, None), int) else value
    for name in getattr(config, "sub_configs", {}):
        sub = getattr(config, name, None)
        if isinstance(sub, PretrainedConfig):
            values[name] = _shrunk(sub, fields.get(name, {})).to_dict()
    values.update({k: v for k, v in fields.items() if not isinstance(v, dict) or k not in values})
    return type(config)(**values)


def toy_model(family: str) -> PreTrainedModel:
    """A model in fp32 with the attention that transformers chooses for it."""
    config = toy_config(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Absolute, rotary and learned positions, no positions, softcap, scale, recurrence, convolution, mixtures of experts
QUICK = {
    **dict.fromkeys(("qwen3", "gemma2", "cohere", "phi3", "gpt2", "bloom", "qwen3_moe", "lfm2", "mamba"), "exact"),
    **{"llama4_text": "exact", "doge": "refused", "recurrent_gemma": "row by row", "rwkv": "row by row"},
    **{"bart": "row by row", "modernbert-decoder": "refused", "cpmant": "refused"},
}


def verdict(model: PreTrainedModel) -> tuple[str, str]:
    """What the self-check would make of a model, and why, from the deviations alone."""
    ids = torch.randint(5, 250, (LONG,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        found = deviations(model, ids, 256, torch.device("cpu"))  # not the id whose embedding is initialized to zero
    most = tolerance(torch.float32, getattr(model.config.get_text_config(), "num_hidden_layers", 1), found.rounding)
    if not found.head <= most:
        return "refused", "transforms states between the backbone and the output embeddings"
    if not found.later <= most:
        return "refused", "not causal: states change with later tokens"
    return ("exact", "") if found.together <= most else ("row by row", "padding or other rows change the states")


@dataclass(frozen=True)
class Outcome:
    """What becomes of a family: `exact`, `row by row`, `refused`, `not built` (why), and how far it was off."""

    family: str
    verdict: str
    reason: str = ""
    error: float = 0.0  # nats, log-probabilities of completions against the model's own logits, row by row


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises a `TimeoutError` after so much processor time: on a busy machine a clock would stop what is not slow."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcome(family: str, folder: str) -> Outcome:
    """
    Trains two steps, then compares scores and the student's states with the model's own logits of single rows.

    The error is that of all contexts in one batch, prefix sharing included where the trainer allows it, and of the
    student's padded micro-batch.
    """
    try:
        model = toy_model(family)
    except Exception as error:
        return Outcome(family, "not built", _line(error))
    rows = [{"prompt": "q" * n, "reference": "r" * 300 + "s" * n} for n in (2, 19, 7, 31)]
    template = "{reference} {question}"
    args = PurifiedOPSDConfig(
        **{"output_dir": folder, "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True},
        **{"gradient_checkpointing": False, "save_strategy": "no", "max_steps": 2, "max_completion_length": 8},
        **{"per_device_train_batch_size": 4, "learning_rate": 1e-3, "dataloader_pin_memory": False},
        **{"teacher_prompt_template": template, "reference_prompt_template": "{reference} ", "scoring_batch_size": 8},
    )
    try:
        trainer = PurifiedOPSDTrainer(model, args, Dataset.from_list(rows), processing_class=build_tokenizer(None))
        trainer.train()
    except InputError as error:
        return Outcome(family, "refused", _line(error))
    except TimeoutError:
        raise
    except Exception as error:
        return Outcome(family, "fails", _line(error))
    verdict = "row by row" if runs_rows_apart(trainer.model) else "exact"
    return Outcome(family, verdict, error=max(scoring_error(trainer), student_error(trainer)))


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


PROMPTS = {
    "base": [[*range(40, 60)], [*range(70, 76)]],
    "teacher": [[*range(100, 200)] * 3 + [*range(50, 60)], [*range(90, 150)]],
    "reference_only": [[*range(100, 200)] * 3 + [61], [*range(80, 91)]],
}
COMPLETIONS = [[30, 31, 32, 33, 34, 35, 36], [37, 38, 39]]


def _own_log_probs(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """`[n, V]` of a completion, by the model's own forward on the one row."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1], -1)


@torch.no_grad()
def scoring_error(trainer: PurifiedOPSDTrainer) -> float:
    """Largest deviation in nats, over all contexts and rows, of the frozen copy's scores."""
    scores, model = trainer.scoring_callback.score(PROMPTS, COMPLETIONS), trainer.scoring_callback.teacher_model
    worst = 0.0
    for context, prompts in PROMPTS.items():
        for row, (prompt, completion) in enumerate(zip(prompts, COMPLETIONS, strict=True)):
            own = torch.log_softmax(scores.head.logits(scores.hidden[context][row, : len(completion)]), -1)
            worst = max(worst, float((own - _own_log_probs(model, prompt, completion)).abs().max()))
    return worst


@torch.no_grad()
def student_error(trainer: PurifiedOPSDTrainer) -> float:
    """Largest deviation in nats of the student's states in a batch with padding on both sides."""
    model, prompts = trainer.model.eval(), PROMPTS["base"]
    width, longest = max(map(len, prompts)), max(map(len, COMPLETIONS))
    ids, mask = torch.zeros(2, 2, width + longest, dtype=torch.long).unbind(0)
    for row, (prompt, completion) in enumerate(zip(prompts, COMPLETIONS, strict=True)):
        at = slice(width - len(prompt), width + len(completion))
        ids[row, at], mask[row, at] = torch.tensor(prompt + completion), 1
    states, head = last_hidden_states(model, ids, mask, longest), LMHead.from_model(model)
    return max(
        float((head.logits(states[row, : len(c)]).log_softmax(-1) - _own_log_probs(model, p, c)).abs().max())
        for row, (p, c) in enumerate(zip(prompts, COMPLETIONS, strict=True))
    )


# The table of docs/models.md -----------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
HEADINGS = ("exact", "row by row", "refused", "fails", "not built", "not run")


def measured(family: str) -> tuple[str, str, str]:
    """Family, what becomes of it, and why."""
    try:
        with time_limit(100):
            model = toy_model(family)
    except Exception as error:
        return family, "not built", _line(error)
    try:
        with time_limit(100):
            return family, *verdict(model)
    except TimeoutError:
        return family, "not run", "more than 100 s of processor time"
    except Exception as error:
        return family, "fails", _line(error)


def table(results: list[tuple[str, str, str]]) -> str:
    """Markdown: one line per outcome and reason; families that could not be built at toy size on the last line."""
    lines = ["| | families | why |", "|---|---|---|"]
    for heading in HEADINGS:
        named = heading in HEADINGS[3:]  # reasons of the toy size, not of the family
        reasons = dict.fromkeys("" if named else why for _, result, why in results if result == heading)
        for reason in reasons:
            families = [f"`{f}`" for f, result, why in results if result == heading and (named or why == reason)]
            lines.append(f"| {heading.capitalize()} | {', '.join(families)} | {reason} |")
    return "\n".join(lines)


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- families -->")
    _, _, after = rest.partition("<!-- /families -->")
    body = table([measured(family) for family in FAMILIES])
    PAGE.write_text(f"{before}<!-- families -->\n{body}\n<!-- /families -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
