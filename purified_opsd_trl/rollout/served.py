"""
The trainer's part of rollouts from `vllm serve`: adapters go there by name, batches are requested before their step.

```text
step t:  publish adapter t -> request batch t + k from it -> take batch t (written by adapter t - k) -> score, train
```
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import PurifiedOPSDConfig
from ..errors import InputError
from .adapters import AdapterWindow, adapter_weights, check_servable, start_command
from .ahead import Rollout, RolloutQueue, coming_batches, copied_state, version_of
from .servers import ServerPool


VERSIONS_FOLDER = "rollout_adapters"  # in a checkpoint: the versions that wrote the batches in flight
_NOW = -1  # number of a batch that is requested and taken at once
_TOLERANCE = 0.5  # nats; bf16 and fp8 differ by some hundredths, another model by several nats


def sends_to_servers(args: PurifiedOPSDConfig) -> bool:
    """Whether rollouts come from servers that are sent the adapter."""
    return args.vllm_adapter_sync and args.vllm_mode == "server"


@contextmanager
def without_trls_client(args: PurifiedOPSDConfig) -> Iterator[None]:
    """Keeps TRL from connecting to servers of `vllm_adapter_sync` itself: its client opens an NCCL group."""
    used, args.use_vllm = args.use_vllm, args.use_vllm and not sends_to_servers(args)
    try:
        yield
    finally:
        args.use_vllm = used


class ServedTrainer(Trainer):
    """Mixin of the trainer: completions of `vllm serve`, with `vllm_adapter_sync`."""

    args: PurifiedOPSDConfig
    model: Any
    eos_token_ids: list[int]  # TRL's, as the next four
    tools: list[Any]
    _metrics: dict[str, Any]
    _tokenize_prompts: Any
    _train_batch_size: int
    reader: Any  # `ReadingTrainer`'s
    run_inside: Any  # the trainer's own
    _train_sampler: Any  # `ReliableTrainer`'s, as the next one
    _run_folder: Any
    _pool: ServerPool | None = None  # on the main process
    _window: AdapterWindow | None = None  # on the main process
    _queue: RolloutQueue | None = None  # on the main process
    _published: int | None = None  # newest version on the servers, known to every process
    _coming: Iterator[tuple[int, list[dict[str, Any]]]] | None = None
    _requested: dict[int, list[list[int]]]  # own prompts of the batches that were requested
    last_rollout: Rollout | None = None  # of the batch that is trained on
    _next_batch = 0  # number of the first batch that was not requested
    _first_version = 0
    _resumed_from: str | None = None
    _epoch_began: tuple[int, torch.Tensor]  # step and random state

    # Before training -------------------------------------------------------------------------------------------------

    def connect_servers(self) -> None:
        """
        Connects to the servers of `vllm_adapter_sync`, and has them load the adapter once.

        Raises:
            [`InputError`]: if a server does not answer, cannot load the adapter, or has too little room, or if the run
                asks for what cannot be served.
        """
        args = self.args
        if not sends_to_servers(args):
            return
        check_servable(self.model)
        if self.tools and (args.rollouts_ahead or self.accelerator.num_processes > 1):
            raise InputError(
                "`tools` call for turn after turn with one adapter: with `vllm_adapter_sync` they need "
                "`rollouts_ahead: 0` and one process."
            )
        if args.rollouts_ahead and isinstance(self.train_dataset, IterableDataset):
            raise InputError(
                "`rollouts_ahead` reads rows before their step, which a stream cannot: set `rollouts_ahead: 0`, or "
                "load the data without streaming."
            )
        self._requested = {}
        weights = adapter_weights(self.model, self.accelerator)

        def connect() -> None:
            urls = args.vllm_server_base_url or [f"http://{args.vllm_server_host}:{args.vllm_server_port}"]
            pool = ServerPool(list(urls), args.vllm_server_timeout, args.vllm_request_timeout)
            pool.wait_for_all()
            try:
                self._check_room(pool)
                self._pool = pool
                self._open_window().publish(0, weights)
                self._close_window()
            except InputError as error:
                url = pool.servers[0].url
                command = start_command(self.model, args.rollouts_ahead, args.vllm_max_model_length, url)
                raise InputError(f"{error} Start the server with: {command}") from None

        self._on_main(connect)

    def _check_room(self, pool: ServerPool) -> None:
        needed = self.args.vllm_max_model_length or self.args.max_completion_length + 1
        for server in pool.servers:
            room = server.models()[0]["max_model_len"]
            if room < needed:
                raise InputError(
                    f"The vLLM server at {server.url} holds sequences of {room} tokens, but the longest prompt and "
                    f"`max_completion_length` together have {needed}."
                )

    def _on_main(self, function: Callable[[], Any]) -> Any:
        """What a function returns on the main process, on every process; so with its error."""
        outcome: list[Any] = [None, None]
        raised: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                outcome[0] = function()
            except Exception as error:
                raised = error
                outcome[1] = (isinstance(error, ConnectionError), str(error))
        if self.accelerator.num_processes > 1:
            outcome = broadcast_object_list(outcome)
        if raised is not None:
            raise raised
        if outcome[1] is not None:
            raise (ConnectionError if outcome[1][0] else InputError)(outcome[1][1])
        return outcome[0]

    # Versions of the adapter -----------------------------------------------------------------------------------------

    def _open_window(self) -> AdapterWindow:
        """A new session on the servers (main process)."""
        assert self._pool is not None
        run = self._run_folder.run_id if self._run_folder is not None else secrets.token_hex(8)
        folder = Path(self.args.vllm_adapter_dir or Path(self.args.output_dir or ".") / "_adapters")
        config = self.model.peft_config[self.model.active_adapter]
        window = AdapterWindow(self._pool, folder, run, secrets.token_hex(4), config)
        self._window, self._queue = window, RolloutQueue(self._complete)
        return window

    def _close_window(self) -> None:
        # vLLM fails if it cannot open an adapter that a request names: after a stop in the middle, the next session of
        # the run removes what is left
        if self._window is not None and self._queue is not None and not self._queue.writing():
            self._window.close()
        self._window = self._queue = None

    def _end_session(self) -> None:
        """Takes all versions from the servers: the weights are about to change by something else than a step."""
        if self.accelerator.is_main_process:
            self._close_window()
        self._published = self._coming = self._resumed_from = None
        self._requested = {}

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        if not sends_to_servers(self.args):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self._end_session()
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except ConnectionError:
            self._save_what_was_trained(trial)
            raise
        finally:
            self._end_session()

    def _save_what_was_trained(self, trial: Any) -> None:
        """A checkpoint of the steps that were taken before all servers were lost."""
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        began, random_state = self._epoch_began
        if step == began:
            torch.set_rng_state(random_state)
        if step > 0 and not folder.exists():
            self._save_checkpoint(self.model_wrapped, trial)
            self.accelerator.print(f"All vLLM servers are lost: {folder} holds the {step} steps that were taken.")

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if sends_to_servers(self.args) and not self.is_in_train:
            self._end_session()
        return super().evaluation_loop(*args, **kwargs)

    def _publish(self, prompt_ids: list[list[int]]) -> int:
        """Version of the weights as they are, loaded on the servers."""
        version = int(self.state.global_step)
        if version == self._published:
            return version
        weights = adapter_weights(self.model, self.accelerator)
        opening = self._published is None
        kept = self._kept_versions(version) if opening else []

        def publish() -> None:
            window = self._open_window() if opening else self._window
            assert window is not None
            for old in kept:
                window.restore(old, Path(str(self._resumed_from)) / VERSIONS_FOLDER)
            window.forget(before=version - self.args.rollouts_ahead)
            window.publish(version, weights)

        self._on_main(publish)
        self._published = version
        if opening:
            self._first_version = min([version, *kept])
            self._check_first_token(prompt_ids[0][:256], version)
        return version

    def _kept_versions(self, version: int) -> list[int]:
        """Versions in the checkpoint that this run needs again."""
        if not self.args.rollouts_ahead or self._resumed_from is None or not self.is_in_train:
            return []
        folders = (Path(self._resumed_from) / VERSIONS_FOLDER).glob("*")
        return sorted(v for v in (int(f.name) for f in folders) if version - self.args.rollouts_ahead <= v < version)

    def _check_first_token(self, prompt: list[int], version: int) -> None:
        """Compares the first token's probabilities of every server with those of the model: is it the same model?"""

        def log_probabilities() -> torch.Tensor:
            ids = torch.tensor([prompt], device=self.accelerator.device)
            with self.accelerator.autocast():
                logits = self.model.forward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            return logits[0, -1].float().log_softmax(-1)

        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            own = self.run_inside(self.model_wrapped, self.model, log_probabilities)
        self.model.train(training)

        def compare() -> None:
            assert self._pool is not None and self._window is not None
            name = self._window.name(version)
            for url, theirs in self._pool.each(lambda server: server.first_token(prompt, name)).items():
                apart = sum(abs(float(own[token]) - value) for token, value in theirs.items()) / len(theirs)
                if not apart < _TOLERANCE:
                    raise InputError(
                        f"The vLLM server at {url} is not the model in training: of the {len(theirs)} tokens that it "
                        f"finds likeliest the log-probabilities differ by {apart:.2f} nats on average. It must serve "
                        f"{self.model.config._name_or_path}, of the same revision."
                    )

        self._on_main(compare)

    # Completions -----------------------------------------------------------------------------------------------------

    def _complete(self, prompts: list[list[int]], version: int) -> list[list[int]]:
        """One completion per prompt, from the main process; called in threads."""
        assert self._pool is not None and self._window is not None
        return self._pool.complete(prompts, self._window.name(version), self._sampling())

    def _sampling(self) -> dict[str, Any]:
        """Sampling parameters as TRL sends them, and the tokens at which TRL ends a completion."""
        args = self.args
        parameters: dict[str, Any] = {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "min_p": args.min_p or 0.0,
            "repetition_penalty": args.repetition_penalty,
            "max_tokens": args.max_completion_length,
            "stop_token_ids": self.eos_token_ids,
        }
        if args.vllm_structured_outputs_regex is not None:
            parameters["structured_outputs"] = {"regex": args.vllm_structured_outputs_regex}
        return {**parameters, **dict(args.generation_kwargs or {})}  # type: ignore[arg-type]  # no longer JSON text

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, has_tool_images: bool = False
    ) -> list[list[int]]:
        if not sends_to_servers(self.args):
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)  # type: ignore[misc]
        if images is not None:
            raise InputError("`vllm_adapter_sync` serves text alone, but rows hold images. Set it to false.")
        version = self._publish(prompt_ids)
        if not self.model.training:
            self._request(_NOW, version, prompt_ids)
            return self._take(_NOW, prompt_ids).completions[self.accelerator.process_index]
        step = int(self.state.global_step)
        if self._coming is None:
            self._request(step, version, prompt_ids)
        else:
            self._request_coming(self._coming, step)
        self.last_rollout = rollout = self._take(step, prompt_ids)
        for name, value in rollout.metrics(step).items():
            self._metrics["train"][name].append(value)
        return rollout.completions[self.accelerator.process_index]

    def _request_coming(self, coming: Iterator[tuple[int, list[dict[str, Any]]]], step: int) -> None:
        """Requests the batches up to `rollouts_ahead` steps from now that were not requested yet."""
        ahead = self.args.rollouts_ahead
        while self._next_batch <= min(step + ahead, self.state.max_steps - 1):
            number, rows = next(coming)
            contexts = self.reader.contexts(rows, f"step {number}, generation batch")
            prompt_ids = self._tokenize_prompts([context.base for context in contexts])[0]
            self._request(number, version_of(number, ahead, self._first_version), prompt_ids)
            self._next_batch = number + 1

    def _request(self, batch: int, version: int, prompt_ids: list[list[int]]) -> None:
        self._requested[batch] = prompt_ids
        gathered = gather_object([prompt_ids])
        self._on_main(lambda: self._queue.ask(batch, version, gathered))  # type: ignore[union-attr]

    def _take(self, batch: int, prompt_ids: list[list[int]]) -> Rollout:
        same = self._requested.pop(batch, None) == prompt_ids
        if not all(gather_object([same])):
            raise RuntimeError(
                f"Step {batch}: the rows that arrived are not those that were requested ahead. A sampler or data "
                "loader of your own needs `rollouts_ahead: 0`."
            )
        return self._on_main(lambda: self._queue.take(batch))  # type: ignore[union-attr]

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]  # transformers calls it by keyword
        if self.args.rollouts_ahead and self._coming is None:
            repeats, kept = self.args.gradient_accumulation_steps, self._train_sampler
            sampler = copied_state(self._get_train_sampler(), kept)
            self._train_sampler = kept
            self._next_batch = int(self.state.global_step)
            self._coming = coming_batches(
                sampler,
                self.train_dataset,
                self._train_batch_size * repeats,
                repeats,
                self.accelerator.num_processes,
                self.accelerator.process_index,
                kwargs["steps_trained_in_current_epoch"] // repeats,
                self._next_batch,
            )
        # The data loader is about to draw a seed, and draws it again when a run resumes at the beginning of an epoch
        self._epoch_began = int(self.state.global_step), torch.get_rng_state()
        super()._run_epoch(**kwargs)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.rollouts_ahead and self._window is not None:
            step = int(self.state.global_step)
            self._window.keep(range(step - self.args.rollouts_ahead, step), Path(output_dir) / VERSIONS_FOLDER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint
