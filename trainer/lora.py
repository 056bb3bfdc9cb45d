"""LoRA through PEFT: which linear layers carry it, that each one really learns, and the adapter's files."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraModel
from safetensors.torch import save
from torch import Tensor, nn

from trainer.config import PeftSection
from trainer.errors import ConfigError, TrainingFailed
from trainer.files import write_atomically
from trainer.model import blocks_of
from trainer.parallel import World

ADAPTER = "default"
OUT_PROJ = "mixer.out_proj"
OUT_PROJ_README = """# LoRA adapter with mamba `out_proj` layers

PEFT refuses `out_proj` of mamba models by name, also when it only loads an adapter: in training, the
fused kernel bypasses that layer. This adapter was trained on a path that calls it, and inference calls it
anyway. Load it with

    from trainer.lora import load_adapter
    model = load_adapter(base_model, "this folder")

which is `PeftModel.from_pretrained` without that refusal.
"""


@dataclass(frozen=True)
class Targets:
    """The linear layers that carry LoRA, out of all that the model has."""

    names: tuple[str, ...]
    linear_layers: int
    notes: tuple[str, ...]


def choose_targets(causal_lm: nn.Module, section: PeftSection) -> Targets:
    """Matches the config's names against the model's linear layers.

    `match_all_linear` takes every linear layer of the blocks, except the mamba `out_proj`: plain PEFT
    could not load the adapter. It is trained when `target_modules` names it. Raises ConfigError for a
    name that matches nothing.
    """
    linear = [name for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear)]
    if section.match_all_linear:
        in_blocks = [name for name in linear if ".layers." in name]
        chosen = [name for name in in_blocks if not name.endswith(OUT_PROJ)]
        skipped = len(in_blocks) - len(chosen)
    else:
        chosen = _matching(linear, section.target_modules or (), "peft.target_modules")
        skipped = 0
    excluded = set(_matching(linear, section.exclude_modules, "peft.exclude_modules"))
    chosen = [name for name in chosen if name not in excluded]
    if not chosen:
        raise ConfigError(
            "peft.exclude_modules leaves no linear layer to adapt.",
            remedy="shorten peft.exclude_modules",
            context={"key": "peft.exclude_modules"},
        )
    notes = []
    if section.match_all_linear:
        notes.append("match_all_linear takes the linear layers of the blocks: lm_head is left out")
    if skipped:
        notes.append(
            f"match_all_linear leaves out {skipped} mamba out_proj layers: PEFT would refuse to load the "
            "adapter; name out_proj in peft.target_modules to train them"
        )
    return Targets(tuple(chosen), len(linear), tuple(notes))


def _matching(linear: Sequence[str], patterns: Sequence[str], key: str) -> list[str]:
    """The layers that a pattern names, whole or by its ending. Each pattern must match something."""
    found: set[str] = set()
    for pattern in patterns:
        matches = [
            n for n in linear if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"*.{pattern}")
        ]
        if not matches:
            endings = sorted(Counter(name.rpartition(".")[2] for name in linear))
            raise ConfigError(
                f"{key} names {pattern}, which matches no linear layer of the model.",
                remedy=f"take from: {', '.join(endings)}",
                context={"key": key, "pattern": pattern},
            )
        found.update(matches)
    return [name for name in linear if name in found]


def add_lora(causal_lm: Any, targets: Targets, section: PeftSection, *, seed: int) -> PeftModel:
    """The model with fp32 adapters on `targets`; nothing else is trainable. The same on every process."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=section.dim,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # PEFT only divides by it
        lora_dropout=section.dropout,
        target_modules=list(targets.names),
        task_type="CAUSAL_LM",
    )
    with _out_proj_allowed():
        return get_peft_model(causal_lm, config, adapter_name=ADAPTER, autocast_adapter_dtype=True)


@contextmanager
def _out_proj_allowed() -> Iterator[None]:
    """Lifts PEFT's refusal of the mamba `out_proj`: `mamba.py` sees to it that the layer is called."""
    with mock.patch.object(LoraModel, "_check_target_module_compatiblity", create=True):
        yield


def load_adapter(causal_lm: Any, folder: str | Path) -> PeftModel:
    """`PeftModel.from_pretrained` that also takes adapters on the mamba `out_proj`."""
    with _out_proj_allowed():
        return PeftModel.from_pretrained(causal_lm, str(folder))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def share_adapted(model: PeftModel, targets: Targets) -> dict[str, object]:
    """Which share of the layers and parameters is adapted, for the run's summary."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trainable = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    base = sum(sizes.values()) - trainable
    adapted = sum(sizes[f"base_model.model.{name}.base_layer.weight"] for name in targets.names)
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    return {
        "parameters": base,
        "trainable_parameters": trainable,
        "trainable_share": trainable / base,
        "linear_layers": targets.linear_layers,
        "adapted_layers": len(targets.names),
        "adapted_parameters_share": adapted / base,
        "routed_expert_parameters_share": experts / base,
        "blocks": len(blocks_of(model.get_base_model())),
        "adapted_by_name": dict(Counter(name.rpartition(".")[2] for name in targets.names)),
    }


def require_gradients(adapters: dict[str, nn.Parameter], world: World) -> None:
    """After the first backward pass: stops if an adapter learns nothing.

    B starts at zero, so A's first gradient is exactly zero: a layer passes if both have a gradient and
    one of the two isn't all zero. Raises TrainingFailed with the layers' names on every process.
    """
    layers: dict[str, bool] = {}
    for name, parameter in adapters.items():
        layer = name.partition(".lora_")[0]
        layers.setdefault(layer, False)
        layers[layer] |= parameter.grad is not None and bool(parameter.grad.count_nonzero())
    absent = {name.partition(".lora_")[0] for name, parameter in adapters.items() if parameter.grad is None}
    dead_here = {layer for layer, learns in layers.items() if not learns or layer in absent}
    dead = sorted(set.intersection(*world.gather(dead_here)))
    if dead:
        names = [name.removeprefix("causal_lm.").removeprefix("base_model.model.") for name in dead]
        shown = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
        raise TrainingFailed(
            f"{len(dead)} of {len(layers)} adapted layers got no gradient in the first step: {shown}",
            remedy="name them in peft.exclude_modules, or report this: a kernel bypasses them",
            context={"layers": ", ".join(names)},
        )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Writes the adapter in PEFT's format: adapter_model.safetensors and adapter_config.json."""
    folder.mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=adapter_parameters(model), adapter_name=ADAPTER, save_embedding_layers=False
    )
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    model.peft_config[ADAPTER].save_pretrained(str(folder))
    if any(OUT_PROJ in name for name in on_cpu):
        write_atomically(folder / "README.md", OUT_PROJ_README)
    write_atomically(folder / "adapter_model.safetensors", save(on_cpu, metadata={"format": "pt"}))
