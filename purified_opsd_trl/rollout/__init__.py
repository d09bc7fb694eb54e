"""
Where the student's completions come from, besides TRL's own generation.

`colocated.py` prepares vLLM in the training process; `servers.py` talks to `vllm serve`; `adapters.py` publishes LoRA
adapters there; `ahead.py` requests batches before their step; `served.py` is the trainer's part.
"""
