"""
What one optimizer step costs in time, by arithmetic: without weights and without a GPU.

docs/scaling.md has the error on measured steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .targets import DENSE_TARGETS


@dataclass(frozen=True)
class Model:
    """
    Dimensions of a decoder.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, intermediate, vocab (`int`):
            As in its config.
        tied (`bool`):
            Whether the head is the embedding.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False

    @classmethod
    def of_config(cls, config: Any) -> "Model":
        """Dimensions of a transformers config (`AutoConfig.from_pretrained`)."""
        config = config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

    @property
    def body(self) -> int:
        """Weights of the linear layers; each costs 2 FLOPs per token and forward."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.hidden * self.vocab

    @property
    def weights(self) -> int:
        """All weights except those of norms."""
        return self.body + self.head * (1 if self.tied else 2)

    def adapter(self, rank: int) -> int:
        """Weights of LoRA on all linear layers."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            self.layers
            * rank
            * (2 * (self.hidden + q) + 2 * (self.hidden + kv) + 3 * (self.hidden + self.intermediate))
        )

    @property
    def kv_per_token(self) -> int:
        """Numbers in the KV cache per token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def forward(self, length: int) -> float:
        """FLOPs of a forward of the body over one sequence; causal attention counts half its square."""
        return 2.0 * self.body * length + 2.0 * self.layers * self.heads * self.head_dim * length**2


@dataclass(frozen=True)
class Step:
    """
    Sizes and settings of a step.

    Attributes:
        rows (`int`):
            Global batch: completions per step.
        question, reference, completion (`int`):
            Tokens of each, templates included.
        target (`str`):
            As in the config. It says which contexts are scored, and how many of their states the loss projects.
        difference (`bool`):
            Whether the purified target needs the difference of the teacher's and the probe's states alone, as with a
            linear head, centering and `loss_type: divergence`.
        lora (`bool`):
            Whether only an adapter is trained: no gradient of the base weights is formed.
        checkpointing (`bool`):
            Whether the backward recomputes the forward.
        trainable_head (`bool`):
            Whether the head has a gradient.
        shared_prefix (`bool`):
            Whether the reference comes first and is scored once for both contexts that hold it.
        micro_batch (`int`):
            Rows of a student forward on one GPU.
        scoring_batch (`int`):
            Sequences of a scoring forward on one GPU.
        scoring_tokens (`int`):
            `scoring_token_budget`; 0 is no limit.
        train_tokens (`int`):
            `train_token_budget`; 0 is no limit.
        offload (`bool`):
            `offload_scores`.
        vllm (`bool`):
            Whether vLLM generates, with a key-value cache in memory of its own.
        rank (`int`):
            Rank of the adapter, on all linear layers. It is what a server is sent with `ahead`.
    """

    rows: int = 32
    question: int = 256
    reference: int = 2048
    completion: int = 1024
    target: str = "purified"
    difference: bool = True
    lora: bool = True
    checkpointing: bool = True
    trainable_head: bool = False
    shared_prefix: bool = False
    micro_batch: int = 4
    scoring_batch: int = 4
    scoring_tokens: int = 0
    train_tokens: int = 0
    offload: bool = False
    vllm: bool = False
    rank: int = 64

    @property
    def contexts(self) -> tuple[str, ...]:
        """Contexts that are scored."""
        if self.target in DENSE_TARGETS:
            return DENSE_TARGETS[self.target].states
        return ("teacher",) if self.target == "teacher" else ("base", "teacher", "reference_only")

    @property
    def states(self) -> int:
        """Frozen states per token that are stored and projected."""
        return 2 if self.target == "purified" and self.difference else len(self.contexts)

    def length(self, context: str) -> int:
        """Tokens of a sequence that is scored: the prompt of its context, and the completion."""
        question = 0 if context == "reference_only" else self.question
        return question + (0 if context == "base" else self.reference) + self.completion


@dataclass(frozen=True)
class Machine:
    """
    Rates and layout of the machine.

    Attributes:
        gpus (`int`):
            Processes, each with one GPU.
        flops (`float`):
            Peak matrix-product rate of a GPU in FLOP/s.
        utilization (`float`):
            Share of `flops` that training and scoring reach.
        bandwidth (`float`):
            Memory bandwidth of a GPU in bytes/s, of which decoding reaches `decode_utilization`.
        decode_utilization (`float`):
            See `bandwidth`.
        link (`float`):
            Bytes/s at which a GPU receives shards of other GPUs.
        bytes_per_weight (`int`):
            2 in bf16, 4 in fp32.
        overhead (`float`):
            Fixed seconds per layer and forward (kernel launches).
        sharded (`bool`):
            ZeRO-3 or FSDP2: every forward and backward gathers the weights.
        tensor_parallel (`int`):
            GPUs that share one vLLM engine.
        generation_gpus (`int`):
            GPUs of vLLM servers. 0: vLLM shares the training GPUs.
        ahead (`bool`):
            Whether servers write the next batches while the training GPUs train, and are sent adapters
            (`rollouts_ahead`).
    """

    gpus: int = 8
    flops: float = 989e12
    utilization: float = 0.4
    bandwidth: float = 3.35e12
    decode_utilization: float = 0.6
    link: float = 400e9
    bytes_per_weight: int = 2
    overhead: float = 20e-6
    sharded: bool = False
    tensor_parallel: int = 1
    generation_gpus: int = 0
    ahead: bool = False


@dataclass(frozen=True)
class Cost:
    """
    One phase, for the busiest GPU.

    Attributes:
        name (`str`):
            Phase.
        tokens (`float`):
            Tokens that pass through it on this GPU.
        flops (`float`):
            Floating-point operations on this GPU.
        bytes (`float`):
            Bytes read from memory (generation) or received from other GPUs (the rest).
        seconds (`float`):
            Time.
    """

    name: str
    tokens: float
    flops: float
    bytes: float
    seconds: float


def simulate(model: Model, step: Step, machine: Machine) -> list[Cost]:
    """
    Costs of the phases of a step.

    Args:
        model ([`Model`]):
            The student, which is its own teacher.
        step ([`Step`]):
            Its sizes and settings.
        machine ([`Machine`]):
            The machine.

    Returns:
        `list[Cost]`: generation, scoring, student, loss, weight or adapter sync.
    """
    rows = -(-step.rows // machine.gpus)  # of the busiest GPU
    return [
        _generation(model, step, machine, -(-step.rows // (machine.generation_gpus or machine.gpus))),
        _scoring(model, step, machine, rows),
        _student(model, step, machine, rows),
        _loss(model, step, machine, rows),
        _sync(model, step, machine),
    ]


def step_seconds(costs: Sequence[Cost], machine: Machine) -> float:
    """Seconds of a step: the sum of its phases, or with `ahead` the longer of generation and all the rest."""
    if machine.ahead:
        return max(costs[0].seconds, sum(cost.seconds for cost in costs[1:]))
    return sum(cost.seconds for cost in costs)


def balance(model: Model, step: Step, machine: Machine, most: int = 64) -> int | None:
    """
    How many server GPUs keep the training GPUs busy.

    Args:
        model ([`Model`]):
            The student.
        step ([`Step`]):
            Its sizes and settings.
        machine ([`Machine`]):
            The machine; its `generation_gpus` are not read.
        most (`int`, *optional*, defaults to `64`):
            Largest number that is tried.

    Returns:
        `int` or `None`: least number, a multiple of `tensor_parallel`, at which generation takes no longer than the
        rest; `None` if none does, since a batch cannot be divided further.
    """
    for gpus in range(machine.tensor_parallel, most + 1, machine.tensor_parallel):
        generation, *rest = simulate(model, step, replace(machine, generation_gpus=gpus, ahead=True))
        if generation.seconds <= sum(cost.seconds for cost in rest):
            return gpus
    return None


def _generation(model: Model, step: Step, machine: Machine, rows: int) -> Cost:
    q, c = step.question, step.completion
    # Each GPU of an engine holds a share of the weights, but its share of the cache is the same as without sharing
    weights = (model.body + model.head) * machine.bytes_per_weight / machine.tensor_parallel
    cache = rows * (q + c / 2) * model.kv_per_token * machine.bytes_per_weight  # read at the average position
    decode_flops = rows * (model.forward(q + c) - model.forward(q) + 2.0 * model.head * c)
    flops = rows * model.forward(q) + decode_flops
    read = c * (weights + cache)
    # A decoding step is bound by memory or by compute; launches add to it
    decode = max(
        read / (machine.bandwidth * machine.decode_utilization), decode_flops / (machine.flops * machine.utilization)
    )
    seconds = decode + c * model.layers * machine.overhead + _compute(rows * model.forward(q), machine)
    return Cost("generation", rows * (q + c), flops, read, seconds)


def _scoring(model: Model, step: Step, machine: Machine, rows: int) -> Cost:
    lengths = [step.length(context) for context in step.contexts]
    flops, tokens = sum(map(model.forward, lengths)), sum(lengths)
    if step.shared_prefix and "reference_only" in step.contexts:
        flops, tokens = flops - model.forward(step.reference), tokens - step.reference
    forwards = -(-rows * len(lengths) // step.scoring_batch)
    return _passes("scoring", model, machine, rows * tokens, rows * flops, forwards)


def _student(model: Model, step: Step, machine: Machine, rows: int) -> Cost:
    length = step.question + step.completion
    # Backward: gradients of activations, and of weights unless the base is frozen; recomputation adds a forward
    passes = 1 + (1 if step.lora else 2) + (1 if step.checkpointing else 0)
    gathers = 2 + (1 if step.checkpointing else 0)
    forwards = -(-rows // step.micro_batch) * gathers
    cost = _passes("student", model, machine, rows * length, passes * rows * model.forward(length), forwards)
    if step.lora or machine.gpus == 1:
        return cost
    reduced = 2.0 * model.weights * machine.bytes_per_weight  # gradients of all weights, summed over the GPUs
    return replace(cost, bytes=cost.bytes + reduced, seconds=cost.seconds + reduced / machine.link)


def _passes(name: str, model: Model, machine: Machine, tokens: float, flops: float, forwards: int) -> Cost:
    gathered = 0.0
    if machine.sharded and machine.gpus > 1:
        gathered = forwards * model.weights * machine.bytes_per_weight * (machine.gpus - 1) / machine.gpus
    seconds = _compute(flops, machine) + forwards * model.layers * machine.overhead
    # Gathering overlaps with compute, so the longer of the two counts
    return Cost(name, tokens, flops, gathered, max(seconds, gathered / machine.link))


def _loss(model: Model, step: Step, machine: Machine, rows: int) -> Cost:
    # Products with the head: the student's, one per stored state, one for the hidden states' gradient, and one more
    # for the head's own
    products = 2 + step.states + (1 if step.trainable_head else 0)
    tokens = rows * step.completion
    flops = 2.0 * products * model.head * tokens
    return Cost("loss", tokens, flops, 0.0, _compute(flops, machine))


def _sync(model: Model, step: Step, machine: Machine) -> Cost:
    if machine.ahead:  # the adapter goes over the network once
        moved = float(model.adapter(step.rank) * machine.bytes_per_weight)
        return Cost("adapter sync", 0, 0.0, moved, moved / machine.link)
    moved = model.weights * machine.bytes_per_weight
    # vLLM's copy is read and written once, after sharded weights are gathered
    seconds = 2 * moved / machine.bandwidth + (moved / machine.link if machine.sharded and machine.gpus > 1 else 0.0)
    return Cost("weight sync", 0, 0.0, moved, seconds)


def _compute(flops: float, machine: Machine) -> float:
    return flops / (machine.flops * machine.utilization)
