"""
An HTTP server with the part of `vllm serve` that adapter sync uses; it writes with transformers and PEFT.

What a real vLLM does is tested in `vllm_engine`; here the client and the trainer are, in seconds and with faults.
"""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class LoraServer:
    """
    Serves a folder's model and the adapters that it is told to load.

    Args:
        model_dir (`Path`): folder of the model.
        key (`str`, *optional*): API key that requests must carry.
        lora (`bool`, *optional*, defaults to `True`): whether adapters can be loaded.
        max_rank (`int`, *optional*, defaults to `16`): largest rank of an adapter.
        max_model_len (`int`, *optional*, defaults to `2048`): longest sequence.
        port (`int`, *optional*, defaults to `0`): port; `0` takes a free one.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        key: str | None = None,
        lora: bool = True,
        max_rank: int = 16,
        max_model_len: int = 2048,
        port: int = 0,
    ):
        self.base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
        self.model: Any = None  # with adapters
        self.adapters: set[str] = set()
        self.model_dir, self.key, self.lora, self.max_rank, self.max_len = (
            model_dir,
            key,
            lora,
            max_rank,
            max_model_len,
        )
        self.written: list[tuple[str, int]] = []  # adapter and rows of every request
        self.most_adapters = 0
        self.delay = 0.0  # seconds before an answer
        self.nonsense: Any = None  # answer in place of completions
        self.abort_after: int | None = None  # requests after which the server is gone
        self.gone = False
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        """Ends the server: from now on connections are refused."""
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, request: dict[str, Any]) -> None:
                if server.gone:
                    return
                if server.key and self.path != "/health" and self.headers["Authorization"] != f"Bearer {server.key}":
                    status, body = 401, {"error": "Unauthorized"}
                else:
                    status, body = server.answer(self.path, request)
                if status == 0:  # gone
                    self.connection.close()
                    return
                data = json.dumps(body).encode()
                with contextlib.suppress(ConnectionError):  # the client did not wait
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        return Handler

    def answer(self, path: str, request: dict[str, Any]) -> tuple[int, Any]:
        """Status and body for a request."""
        if path == "/health":
            return 200, ""
        if path == "/v1/models":
            models = [{"id": str(self.model_dir), "max_model_len": self.max_len}]
            return 200, {"data": models + [{"id": name, "max_model_len": None} for name in sorted(self.adapters)]}
        if path == "/v1/load_lora_adapter" and self.lora:
            return self._load(request["lora_name"], Path(request["lora_path"]))
        if path == "/v1/unload_lora_adapter" and self.lora:
            with self._lock:
                self.adapters.discard(request["lora_name"])
            return 200, ""
        if path == "/v1/completions":
            return self._complete(request)
        return 404, {"detail": "Not Found"}

    def _load(self, name: str, path: Path) -> tuple[int, Any]:
        def refused(status: int, message: str) -> tuple[int, Any]:
            return status, {"error": {"message": message, "code": status}}

        if name in self.adapters:
            return refused(400, f"The lora adapter '{name}' has already been loaded.")
        if not (path / "adapter_config.json").exists():
            return refused(404, f"Loading lora {name} failed: No adapter found for <path>")
        rank = json.loads((path / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            return refused(500, f"Call to add_lora method failed: LoRA rank {rank} is greater than {self.max_rank}.")
        with self._lock:
            # Without initial weights, whose random numbers would be those of the trainer in this process
            if self.model is None:
                self.model = PeftModel.from_pretrained(self.base, path, adapter_name=name, low_cpu_mem_usage=True)
            else:
                self.model.load_adapter(path, adapter_name=name, low_cpu_mem_usage=True)
            self.model.eval()
            self.adapters.add(name)
            self.most_adapters = max(self.most_adapters, len(self.adapters))
        return 200, "Success"

    @torch.no_grad()
    def _complete(self, request: dict[str, Any]) -> tuple[int, Any]:
        name, prompts = request["model"], request["prompt"]
        if name not in self.adapters:
            return 404, {"error": {"message": f"The model `{name}` does not exist.", "code": 404}}
        if "logprobs" not in request:
            time.sleep(self.delay)
            self.written.append((name, len(prompts)))
            if self.abort_after is not None and len(self.written) > self.abort_after:
                self.gone = True
                threading.Thread(target=self.close).start()
                return 0, None
            if self.nonsense is not None:
                return 200, self.nonsense
        with self._lock:
            self.model.set_adapter(name)
            choices = [self._choice(index, prompt, request) for index, prompt in enumerate(prompts)]
        return 200, {"choices": choices}

    def _choice(self, index: int, prompt: list[int], request: dict[str, Any]) -> dict[str, Any]:
        ids = torch.tensor([prompt])
        choice: dict[str, Any] = {"index": index, "finish_reason": "length", "prompt_token_ids": prompt}
        if "logprobs" in request:
            top = self.model(input_ids=ids).logits[0, -1].log_softmax(-1).topk(request["logprobs"])
            values = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            found = {f"token_id:{token}": value for token, value in values}
            return {**choice, "token_ids": [int(top.indices[0])], "logprobs": {"top_logprobs": [found]}}
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request["max_tokens"],
            do_sample=request["temperature"] > 0,
            eos_token_id=request["stop_token_ids"],
            pad_token_id=256,
        )
        return {**choice, "token_ids": output[0, len(prompt) :].tolist()}
