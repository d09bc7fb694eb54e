"""
`vllm serve` over HTTP: LoRA adapters loaded by name, completions as token ids, rows spread over several servers.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import requests

from ..errors import InputError


logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
CONNECT_SECONDS = 5.0  # for a connection, and for answers that need no work
LOAD_SECONDS = 300.0  # for an adapter, which waits for the step that the engine is in
RETRY_SECONDS = 1.0  # between two looks at servers that are down


class ServerDown(ConnectionError):
    """A server does not answer, or answers that it cannot go on."""


class VLLMServer:
    """
    One `vllm serve`.

    The environment variable `VLLM_API_KEY` is sent as its key. Proxies of the environment are not used.

    Args:
        url (`str`):
            Its address, `http://host:port`.
        request_timeout (`float`):
            Seconds that completions may take.
    """

    def __init__(self, url: str, request_timeout: float):
        self.url = url.rstrip("/")
        self.request_timeout = request_timeout

    def _call(self, method: str, path: str, timeout: float, payload: Any = None) -> tuple[int, Any]:
        """Status and body (JSON, else text) of an answer."""
        key = os.environ.get("VLLM_API_KEY")
        try:
            with requests.Session() as session:  # of its own: several threads call
                session.trust_env = False
                response = session.request(
                    method,
                    f"{self.url}{path}",
                    json=payload,
                    headers={"Authorization": f"Bearer {key}"} if key else None,
                    timeout=(CONNECT_SECONDS, timeout),
                )
        except requests.Timeout:
            raise self._down(f"no answer within {timeout:g} s") from None
        except requests.exceptions.ConnectionError:
            raise self._down("no connection") from None
        except requests.RequestException as error:  # not a URL, and the like
            raise InputError(f"`vllm_server_base_url`: {self.url} cannot be called: {error}.") from None
        if response.status_code in (401, 403):
            raise InputError(
                f"The vLLM server at {self.url} refuses the key (status {response.status_code}). Set VLLM_API_KEY to "
                "what the server was started with."
            )
        try:
            return response.status_code, response.json()
        except ValueError:
            return response.status_code, response.text

    def _down(self, reason: str) -> ServerDown:
        return ServerDown(f"The vLLM server at {self.url} is lost ({reason})")

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            return self._call("GET", "/health", CONNECT_SECONDS)[0] == 200
        except ServerDown:
            return False

    def models(self) -> list[dict[str, Any]]:
        """
        What it serves: the model first, then its adapters.

        Raises:
            [`InputError`]: if it is no vLLM server.
        """
        status, body = self._call("GET", "/v1/models", CONNECT_SECONDS)
        models = body.get("data") if isinstance(body, dict) else None
        if status != 200 or not isinstance(models, list) or not models or "max_model_len" not in models[0]:
            raise InputError(
                f"`vllm_server_base_url`: {self.url} is no vLLM server (status {status} for /v1/models). Name the "
                "address that `vllm serve` prints, without a path."
            )
        return models

    def load(self, name: str, folder: Path) -> None:
        """
        Loads an adapter.

        Args:
            name (`str`):
                Name that requests select it by.
            folder (`Path`):
                Folder with `adapter_config.json` and `adapter_model.safetensors`, which the server reads.

        Raises:
            [`InputError`]: if the server refuses it.
        """
        payload = {"lora_name": name, "lora_path": str(folder)}
        status, body = self._call("POST", "/v1/load_lora_adapter", LOAD_SECONDS, payload)
        reason = _reason(body)
        if status == 200 or "already been loaded" in reason:
            return
        if status == 404 and "No adapter found" in reason:
            reason = f"it finds no adapter in {folder}; `vllm_adapter_dir` must be a folder that the server reads too"
        elif status == 404:
            reason = "it was started without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        raise InputError(f"The vLLM server at {self.url} cannot load the adapter: {reason}.")

    def unload(self, name: str) -> None:
        """Unloads an adapter, if it is there."""
        self._call("POST", "/v1/unload_lora_adapter", LOAD_SECONDS, {"lora_name": name})

    def complete(self, prompts: Sequence[list[int]], adapter: str, sampling: Mapping[str, Any]) -> list[list[int]]:
        """
        Writes one completion per prompt.

        Args:
            prompts (`Sequence[list[int]]`):
                Token ids.
            adapter (`str`):
                Name of a loaded adapter.
            sampling (`Mapping[str, Any]`):
                Sampling parameters of the request.

        Returns:
            `list[list[int]]`: token ids, a token that ends the text included.

        Raises:
            [`ServerDown`]: if there is no answer.
            [`LookupError`]: if the server has no such adapter.
            [`InputError`]: if it refuses the request, or answers something else than completions of these prompts.
        """
        payload = {**sampling, "model": adapter, "prompt": list(prompts), "return_token_ids": True}
        status, body = self._call("POST", "/v1/completions", self.request_timeout, payload)
        if status == 404 and "does not exist" in _reason(body):
            raise LookupError(adapter)
        if status >= 500:
            raise self._down(f"status {status}: {_reason(body)}")
        if status != 200:
            raise InputError(f"The vLLM server at {self.url} refuses a request: {_reason(body)}.")
        try:
            choices = sorted(body["choices"], key=lambda choice: choice["index"])
            if [choice["prompt_token_ids"] for choice in choices] != [list(prompt) for prompt in prompts]:
                raise ValueError("it answered other prompts than it was sent")
            completions = [choice["token_ids"] for choice in choices]
            if any(choice["finish_reason"] == "abort" for choice in choices):
                raise self._down("it aborted the request")
            if not all(ids and all(type(token) is int for token in ids) for ids in completions):
                raise ValueError("a completion holds no token ids")
        except (KeyError, TypeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"The vLLM server at {self.url} does not answer as `vllm serve` does ({what}); vLLM 0.22 to 0.31 do."
            ) from None
        return completions

    def first_token(self, prompt: list[int], adapter: str, count: int = 5) -> dict[int, float]:
        """Log-probabilities, in nats, of the likeliest first tokens after a prompt."""
        payload = {
            **{"model": adapter, "prompt": [prompt], "max_tokens": 1, "logprobs": count, "temperature": 1.0},
            **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "return_tokens_as_token_ids": True},
        }
        status, body = self._call("POST", "/v1/completions", self.request_timeout, payload)
        try:
            found = body["choices"][0]["logprobs"]["top_logprobs"][0]
            return {int(token.removeprefix("token_id:")): float(value) for token, value in found.items()}
        except (KeyError, TypeError, ValueError, IndexError):
            raise InputError(
                f"The vLLM server at {self.url} gives no log-probabilities (status {status}: {_reason(body)})."
            ) from None


def _reason(body: Any) -> str:
    """An error in the server's own words, without its last period."""
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:300].rstrip(".")


class ServerPool:
    """
    Servers of one model, among which rows are divided. One that is lost is left out until it answers again.

    Args:
        urls (`Sequence[str]`):
            Addresses.
        wait (`float`):
            Seconds to wait while no server answers.
        request_timeout (`float`):
            Seconds that the completions of a batch may take on one server.
    """

    def __init__(self, urls: Sequence[str], wait: float, request_timeout: float):
        self.servers = [VLLMServer(url, request_timeout) for url in urls]
        self.wait = wait
        self.adapters: dict[str, Path] = {}  # loaded on every living server
        self._living = list(self.servers)
        self._lock = threading.RLock()

    @property
    def living(self) -> list[VLLMServer]:
        """Servers that answered last time."""
        with self._lock:
            return list(self._living)

    def wait_for_all(self) -> None:
        """
        Waits until every server answers.

        Raises:
            [`InputError`]: for the first that does not.
        """
        deadline = time.monotonic() + self.wait
        for server in self.servers:
            while not server.healthy():
                if time.monotonic() >= deadline:
                    raise InputError(
                        f"`vllm_server_base_url`: no vLLM server answers at {server.url} after {self.wait:g} s."
                    )
                time.sleep(RETRY_SECONDS)

    def each(self, function: Callable[[VLLMServer], T]) -> dict[str, T]:
        """What a function returns for every living server, by its address; those that are down are lost."""
        found = {}
        with self._lock:
            for server in self.living:
                try:
                    found[server.url] = function(server)
                except ServerDown as error:
                    self._lose(server, error)
        return found

    def load(self, name: str, folder: Path) -> None:
        """Loads an adapter on every living server, and on those that answer again, which get all adapters."""
        with self._lock:
            self.adapters[name] = folder
            self.each(lambda server: server.load(name, folder))
            self._take_back()

    def unload(self, name: str) -> None:
        """Unloads an adapter everywhere."""
        with self._lock:
            self.adapters.pop(name, None)
            self.each(lambda server: server.unload(name))

    def unload_left(self, prefix: str) -> None:
        """Unloads adapters that an earlier process left behind, by the beginning of their names."""

        def unload(server: VLLMServer) -> None:
            for model in server.models():
                if model["id"].startswith(prefix):
                    server.unload(model["id"])

        self.each(unload)

    def _lose(self, server: VLLMServer, error: ServerDown) -> None:
        with self._lock:
            if server in self._living:
                self._living.remove(server)
                left = f"{len(self._living)} of {len(self.servers)}"
                logger.warning("%s: its rows go to the other servers (%s are left).", error, left)

    def _take_back(self) -> None:
        """Lost servers that answer again."""
        with self._lock:
            for server in self.servers:
                if server not in self._living and server.healthy():
                    try:
                        for name, folder in self.adapters.items():
                            server.load(name, folder)
                    except ServerDown:
                        continue
                    self._living.append(server)
                    logger.warning("The vLLM server at %s answers again.", server.url)

    def complete(self, prompts: Sequence[list[int]], adapter: str, sampling: Mapping[str, Any]) -> list[list[int]]:
        """
        Writes one completion per prompt; several threads may call it at once.

        Args:
            prompts (`Sequence[list[int]]`):
                Token ids.
            adapter (`str`):
                Name of a loaded adapter.
            sampling (`Mapping[str, Any]`):
                Sampling parameters.

        Returns:
            `list[list[int]]`: token ids in the order of the prompts.

        Raises:
            `ConnectionError`: if no server answers for `wait` seconds.
            [`InputError`]: if a server refuses a request.
        """
        done: dict[int, list[int]] = {}
        while missing := [row for row in range(len(prompts)) if row not in done]:
            servers = self._wait_for_one()
            answers = []
            for i, server in enumerate(servers[: len(missing)]):
                rows = missing[i :: len(servers)]
                own = [prompts[row] for row in rows]
                answers.append((server, rows, in_background(self._share, server, own, adapter, sampling)))
            for server, rows, answer in answers:
                try:
                    done |= zip(rows, answer.result(), strict=True)
                except ServerDown as error:
                    self._lose(server, error)
        return [done[row] for row in range(len(prompts))]

    def _share(
        self, server: VLLMServer, prompts: list[list[int]], adapter: str, sampling: Mapping[str, Any]
    ) -> list[list[int]]:
        try:
            return server.complete(prompts, adapter, sampling)
        except LookupError:  # it was started anew since the adapter was loaded
            server.load(adapter, self.adapters[adapter])
            return server.complete(prompts, adapter, sampling)

    def _wait_for_one(self) -> list[VLLMServer]:
        deadline = time.monotonic() + self.wait
        while not self.living:
            self._take_back()
            if not self.living:
                if time.monotonic() >= deadline:
                    raise ConnectionError(
                        f"No vLLM server answers: {', '.join(server.url for server in self.servers)} (waited "
                        f"{self.wait:g} s, `vllm_server_timeout`)."
                    )
                time.sleep(RETRY_SECONDS)
        return self.living


def in_background(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
    """Result of a function that runs in a thread, which does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
