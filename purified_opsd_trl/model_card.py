"""The part of the trainer that describes its result: the model card, with what was trained and how to load it."""

import os
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard
from transformers import Trainer
from trl.trainer.utils import get_config_model_id

from .config import PurifiedOPSDConfig
from .env import run_versions


class DescribingTrainer(Trainer):
    """Mixin of the trainer: the model card."""

    args: PurifiedOPSDConfig
    model: Any
    target_name: str  # of the target
    _is_vlm: bool  # TRL's
    dataset_name: str | None = None  # a file, folder or hub id, where the training script knows it

    def create_model_card(  # type: ignore[override]  # TRL's signature, not that of transformers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        super().create_model_card(model_name, dataset_name, tags)
        if not self.is_world_process_zero():
            return
        file = Path(str(self.args.output_dir)) / "README.md"
        card = ModelCard.load(file)
        _, _, procedure = card.text.partition("## Training procedure")
        title = card.text.lstrip().split("\n")[0]
        card.text = f"{title}\n\n{self._origin()}\n\n{self._loading()}\n\n## Training procedure{procedure}"
        card.save(file)

    def _origin(self) -> str:
        """What was trained on what, as a list."""
        base = get_config_model_id(self.model.config)
        local = not base or os.path.isdir(base)
        named = (
            f"the local folder `{Path(base).name}`" if base and local else f"[{base}](https://huggingface.co/{base})"
        )
        args, dataset = self.args, self.dataset_name
        if dataset is not None and os.path.exists(dataset):
            dataset = Path(dataset).name
        target = f"`{self.target_name}`"
        if self.target_name == "purified":
            target += f" (`pmi_beta` {args.pmi_beta:g}, `pmi_clip` {args.pmi_clip or 'off'}, center {args.pmi_center})"
        own = {name: text for name, text in run_versions().items() if name in ("purified_opsd_trl", "commit")}
        facts = {
            "Base model": named if base else "a model made in Python",
            "Trained": "LoRA adapter" if is_peft_model(self.model) else "all weights",
            "Dataset": f"`{dataset}`" if dataset else "passed in Python",
            "Target": f"{target}, teacher `{args.teacher_model_kind}`",
            "Steps": f"{self.state.global_step:,}",
            "Package": ", ".join(f"{name} {text}" for name, text in own.items()),
        }
        return "\n".join(f"- {name}: {text}" for name, text in facts.items())

    def _loading(self) -> str:
        """Code that loads and serves the result."""
        place, base = str(self.args.hub_model_id or self.args.output_dir), get_config_model_id(self.model.config)
        vision = "AutoModelForImageTextToText"
        kind, served = vision if self._is_vlm else "AutoModelForCausalLM", f"vllm serve {place}"
        library, merge = "transformers", ""
        if is_peft_model(self.model):
            rank = max(config.r for config in self.model.peft_config.values() if hasattr(config, "r"))
            kind, library = "AutoPeftModelForCausalLM", "peft"
            merge = 'model.merge_and_unload().save_pretrained("merged")  # without PEFT from here on\n'
            served = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules trained={place}"
        imported, loaded = f"from {library} import {kind}", f'{kind}.from_pretrained("{place}", dtype="auto")'
        if self._is_vlm and library == "peft":
            imported = f"from peft import PeftModel\nfrom transformers import {vision}"
            loaded = f'PeftModel.from_pretrained({vision}.from_pretrained("{base}", dtype="auto"), "{place}")'
        return f"## Load it\n\n```python\n{imported}\n\nmodel = {loaded}\n{merge}```\n\n```bash\n{served}\n```"
