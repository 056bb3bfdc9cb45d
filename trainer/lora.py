"""LoRA through PEFT: which layers and experts carry it, that each really learns, and the adapter's files."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors.torch import save
from torch import Tensor, nn

from trainer.config import PeftSection
from trainer.errors import ConfigError, TrainingFailed
from trainer.expert_lora import ADAPTER, adapted_parameters, compute_grouped
from trainer.experts import projections, routed_experts
from trainer.files import write_atomically
from trainer.loading import local_part
from trainer.lora_linear import compute_in_base_dtype
from trainer.model import blocks_of
from trainer.parallel import World
from trainer.sharding import SharedBlocks, SharedParameter

OUT_PROJ = "mixer.out_proj"
BASE = "base.json"
OUT_PROJ_README = """# LoRA adapter with mamba `out_proj` layers

PEFT refuses `out_proj` of mamba models by name, also when it only loads an adapter: in training, the
fused kernel bypasses that layer. This adapter was trained on a path that calls it, and inference calls it
anyway. Load it with

    from trainer.lora import load_adapter
    model = load_adapter(base_model, "this folder")

which is `PeftModel.from_pretrained` without that refusal, or make a whole model of both:

    python -m trainer.merge ADAPTER MODEL OUT
"""


@dataclass(frozen=True)
class Targets:
    """What carries LoRA, out of all that the model has."""

    names: tuple[str, ...]
    """Linear layers."""
    linear_layers: int
    notes: tuple[str, ...]
    experts: tuple[str, ...] = ()
    """Projections of routed experts: one parameter for all experts of a block."""
    expert_projections: int = 0


def choose_targets(causal_lm: nn.Module, section: PeftSection) -> Targets:
    """Matches the config's names against the model's linear layers and routed experts.

    `match_all_linear` takes every linear layer of the blocks, except the mamba `out_proj`: plain PEFT
    could not load the adapter. It is trained when `target_modules` names it. The routed experts are taken
    by `match_routed_experts`, or by a pattern that says `experts`: they are most of the model's
    parameters, so `up_proj` alone doesn't mean them. Raises ConfigError for a name that matches nothing.
    """
    linear = [name for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear)]
    experts = [f"{name}.{part}" for name, module in routed_experts(causal_lm) for part in projections(module)]
    notes = []
    if section.match_all_linear:
        in_blocks = [name for name in linear if ".layers." in name]
        chosen = {name for name in in_blocks if not name.endswith(OUT_PROJ)}
        notes.append("match_all_linear takes the linear layers of the blocks: lm_head is left out")
        if skipped := len(in_blocks) - len(chosen):
            notes.append(
                f"match_all_linear leaves out {skipped} mamba out_proj layers: PEFT would refuse to load "
                "the adapter; name out_proj in peft.target_modules to train them"
            )
    else:
        chosen = _matching(linear, experts, section.target_modules or (), "peft.target_modules")
    if section.match_routed_experts:
        if not experts:
            raise ConfigError(
                "peft.match_routed_experts is true, and the model has no routed experts.",
                remedy="remove peft.match_routed_experts",
                context={"key": "peft.match_routed_experts"},
            )
        chosen |= set(experts)
    chosen -= _matching([*linear, *experts], (), section.exclude_modules, "peft.exclude_modules")
    if not chosen:
        raise ConfigError(
            "peft.exclude_modules leaves no linear layer to adapt.",
            remedy="shorten peft.exclude_modules",
            context={"key": "peft.exclude_modules"},
        )
    if section.dropout and not chosen.isdisjoint(experts):
        notes.append(
            "the adapter's config will say lora_dropout: 0, because PEFT knows no dropout on experts; "
            "training applies peft.dropout to them too"
        )
    return Targets(
        names=tuple(name for name in linear if name in chosen),
        linear_layers=len(linear),
        notes=tuple(notes),
        experts=tuple(name for name in experts if name in chosen),
        expert_projections=len(experts),
    )


def _matching(linear: Sequence[str], experts: Sequence[str], patterns: Sequence[str], key: str) -> set[str]:
    """The layers that a pattern names, whole or by its ending; `experts` only if it says so.

    Each pattern must match something.
    """
    found: set[str] = set()
    for pattern in patterns:
        candidates = [*linear, *experts] if "experts" in pattern.split(".") else linear
        matches = [
            name
            for name in candidates
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
        ]
        if not matches:
            endings = {name.rpartition(".")[2] for name in linear} | _endings_of_experts(experts).keys()
            raise ConfigError(
                f"{key} names {pattern}, which matches no linear layer of the model.",
                remedy=f"take from: {', '.join(sorted(endings))}",
                context={"key": key, "pattern": pattern},
            )
        found.update(matches)
    return found


def _endings_of_experts(names: Sequence[str]) -> dict[str, int]:
    return dict(Counter(".".join(name.split(".")[-2:]) for name in names))


def add_lora(causal_lm: Any, targets: Targets, section: PeftSection, *, seed: int) -> PeftModel:
    """The model with fp32 adapters on `targets`; nothing else is trainable. The same on every process."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=section.dim,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # PEFT only divides by it
        # PEFT refuses dropout beside target_parameters, also when it only loads such an adapter.
        lora_dropout=0.0 if targets.experts else section.dropout,
        use_rslora=section.use_rslora,
        target_modules=list(targets.names),
        target_parameters=list(targets.experts) or None,
        task_type="CAUSAL_LM",
    )
    with _out_proj_allowed():
        model = get_peft_model(causal_lm, config, adapter_name=ADAPTER, autocast_adapter_dtype=True)
    if targets.experts and section.dropout:
        for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
            layer.lora_dropout[ADAPTER] = nn.Dropout(section.dropout)
    compute_grouped(model)
    compute_in_base_dtype(model)
    return model


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
    sizes = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): parameter.numel()
        for name, parameter in model.named_parameters()
    }
    trainable = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    base = sum(sizes.values()) - trainable
    adapted = sum(sizes[f"{name}.weight"] for name in targets.names)
    adapted += sum(sizes[name] for name in targets.experts)
    experts = sum(size for name, size in sizes.items() if ".experts." in name and ".lora_" not in name)
    return {
        "parameters": base,
        "trainable_parameters": trainable,
        "trainable_share": trainable / base,
        "linear_layers": targets.linear_layers,
        "adapted_layers": len(targets.names),
        "expert_projections": targets.expert_projections,
        "adapted_expert_projections": len(targets.experts),
        "adapted_parameters_share": adapted / base,
        "routed_expert_parameters_share": experts / base,
        "blocks": len(blocks_of(model.get_base_model())),
        "adapted_by_name": dict(Counter(name.rpartition(".")[2] for name in targets.names))
        | _endings_of_experts(targets.experts),
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
        names = [name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in dead]
        names = list(dict.fromkeys(names))  # both projections of a block's experts go by the experts' name
        shown = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
        raise TrainingFailed(
            f"{len(dead)} of {len(layers)} adapted layers got no gradient in the first step: {shown}",
            remedy="name them in peft.exclude_modules, or report this: a kernel bypasses them",
            context={"layers": ", ".join(names)},
        )


def save_adapter(model: PeftModel, folder: Path, base: Mapping[str, str] | None = None) -> None:
    """Writes the adapter in PEFT's format: adapter_model.safetensors and adapter_config.json.

    base.json, beside them, says which base it was trained on: what `describe_base` says by default.
    """
    folder.mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=adapter_parameters(model), adapter_name=ADAPTER, save_embedding_layers=False
    )
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    model.peft_config[ADAPTER].save_pretrained(str(folder))
    if any(OUT_PROJ in name for name in on_cpu):
        write_atomically(folder / "README.md", OUT_PROJ_README)
    write_atomically(folder / BASE, json.dumps(base or describe_base(model)) + "\n")
    write_atomically(folder / "adapter_model.safetensors", save(on_cpu, metadata={"format": "pt"}))


def describe_base(model: PeftModel, shared: SharedBlocks | None = None) -> dict[str, str]:
    """The adapted weights' dtype and `base_digest`.

    With shared blocks every process must call it, and with FSDP2 rank 0's is right: it has the first rows.
    """
    rows = {}
    for name, weight in adapted_parameters(model).items():
        if shared and isinstance(weight, SharedParameter):
            shared.hold(weight.block)
            rows[name] = weight.detach().view(-1)[: weight.shape[-1]].to("cpu", copy=True)
        else:
            rows[name] = local_part(weight)[0][: weight.shape[-1]]
        dtype = weight.dtype
    return {"dtype": str(dtype).removeprefix("torch."), "digest": base_digest(rows, dtype)}


def base_digest(first_rows: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """Tells a base from others of its shapes: sha256 over each adapted weight's first row, in `dtype`."""
    digest = hashlib.sha256()
    for name in sorted(first_rows):
        digest.update(first_rows[name].detach().to(dtype).float().cpu().numpy().tobytes())
    return digest.hexdigest()
