"""From a config to a model, its adapters and its data, ready for the first step.

What is cheap to check comes first: a wrong config or a broken line of data is told before weights are loaded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from trainer.config import Config
from trainer.data import Batch, Dataset, Stream, Work, collate, largest_shape, open_dataset
from trainer.errors import ConfigError
from trainer.flops import TrainingFlops, mean_length, training_flops
from trainer.kernels import find_mamba_kernels
from trainer.lora import Targets, adapter_parameters, add_lora, choose_targets, share_adapted
from trainer.metrics import Metrics
from trainer.model import (
    TrainingModel,
    blocks_of,
    checkpoint_activations,
    empty_model,
    fill,
    kernels_in_use,
    model_config,
)
from trainer.outcome import Progress
from trainer.parallel import World
from trainer.passes import Passes
from trainer.placement import Plan, plan_run
from trainer.schedule import make_optimizer
from trainer.sharding import SharedBlocks, shard_with_fsdp2, share
from trainer.tokenizer import open_tokenizer


@dataclass
class Run:
    """All that a run works on."""

    config: Config
    run_dir: Path
    world: World
    metrics: Metrics
    progress: Progress
    peft_model: PeftModel
    training_model: TrainingModel
    adapters: dict[str, nn.Parameter]
    optimizer: torch.optim.Adam
    passes: Passes
    stream: Stream
    validation: Dataset | None
    plan: Plan
    shared: SharedBlocks | None
    """Where processes share the base, but by FSDP2."""
    tokenizer: Any
    pad: int
    flops: TrainingFlops
    steps: int
    """How many the whole training has."""
    pulse: Callable[[], None] = lambda: None
    """A sign of life, to be given after each pass."""
    work_ahead: dict[int, Work] = field(default_factory=dict)
    """Step → what was made for it while the step before was computed."""

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.run_dir / "checkpoints"


def prepare(config: Config, run_dir: Path, world: World, metrics: Metrics, progress: Progress) -> Run:
    """Everything up to the first step, and the run's "start" record. Raises TrainerError."""
    started = time.perf_counter()
    check_batch_sizes(config, world.size)
    kernels = find_mamba_kernels(config.device)
    tokenizer = open_tokenizer(config.model)
    base_config = model_config(config.model)
    check_vocabulary(tokenizer, base_config)
    data, validation = (
        open_dataset(section, tokenizer, vocab_size=base_config.vocab_size, seed=config.seed)
        if section
        else None
        for section in (config.dataset, config.validation_dataset)
    )
    assert data is not None
    stream = Stream(data, config.seed, config.dataset.shuffle)

    causal_lm = empty_model(config.model, base_config, kernels, world.device)
    targets = choose_targets(causal_lm, config.peft)
    plan = plan_run(config, causal_lm, targets, world, longest=data.longest)
    training_model = TrainingModel(causal_lm)
    shared = None
    if plan.shard:
        blocks = blocks_of(causal_lm)
        if config.distributed.gathering == "in_place":
            shared = share(blocks, world, sharers=plan.sharers, whole=plan.whole)
        else:
            shard_with_fsdp2(training_model, blocks, world, sharers=plan.sharers, whole=plan.whole)
    fill(causal_lm, config.model, world.device, seed=config.seed)
    peft_model = add_lora(causal_lm, targets, config.peft, seed=config.seed)
    if plan.again:
        checkpoint_activations(causal_lm, again=plan.again, random=config.peft.dropout > 0)
    adapters = adapter_parameters(peft_model)
    shares = share_adapted(peft_model, targets)
    training_model.train()
    torch.manual_seed(config.seed + 1 + world.rank)  # from here on, dropout: every process its own

    run = Run(
        config=config,
        run_dir=run_dir,
        world=world,
        metrics=metrics,
        progress=progress,
        peft_model=peft_model,
        training_model=training_model,
        adapters=adapters,
        optimizer=make_optimizer(adapters.values(), config.optimizer),
        passes=Passes(
            training_model,
            list(adapters.values()),
            world,
            largest=_largest_batch(config, data, tokenizer.pad_token_id) if plan.records else None,
            shared=shared,
            warn=metrics.note,
        ),
        stream=stream,
        validation=validation,
        plan=plan,
        shared=shared,
        tokenizer=tokenizer,
        pad=tokenizer.pad_token_id,
        flops=training_flops(
            causal_lm,
            mean_length(len(example.input_ids) for example in data.examples),
            device=_device_name(world.device),
            processes=world.size,
        ),
        steps=steps_of(config, stream.rows_in(config.step_scheduler.num_epochs or 0)),
    )
    _announce(run, targets, shares, kernels_in_use(causal_lm, kernels), time.perf_counter() - started)
    return run


def _largest_batch(config: Config, data: Dataset, pad: int) -> Batch:
    """No batch of training has a larger shape. Its numbers mean nothing."""
    rows = [(data.examples[0],)] * config.step_scheduler.local_batch_size
    shape = largest_shape(len(rows), longest=data.longest)
    return collate(rows, pad=pad, row_length=data.row_length, shape=shape)


def check_batch_sizes(config: Config, processes: int) -> None:
    """ConfigError if `processes` can't share out the global batch."""
    scheduler = config.step_scheduler
    multiple = scheduler.local_batch_size * processes
    if scheduler.global_batch_size % multiple:
        raise ConfigError(
            f"global_batch_size {scheduler.global_batch_size} can't be shared out to {processes} processes "
            f"in batches of {scheduler.local_batch_size}.",
            remedy=f"--set step_scheduler.global_batch_size={multiple}  # or a multiple of it",
            context={"key": "step_scheduler.global_batch_size"},
        )


def check_vocabulary(tokenizer: Any, base_config: Any) -> None:
    """ConfigError if the tokenizer has more tokens than the model knows."""
    if len(tokenizer) > base_config.vocab_size:
        raise ConfigError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's vocabulary {base_config.vocab_size}.",
            remedy="give the model's own tokenizer in model.tokenizer",
            context={"key": "model.tokenizer"},
        )


def steps_of(config: Config, rows: int) -> int:
    """Optimizer steps of the whole training, whose epochs have so many rows together."""
    scheduler = config.step_scheduler
    epochs = math.ceil(rows / scheduler.global_batch_size)
    return min(limit for limit in (scheduler.max_steps, epochs) if limit)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _announce(
    run: Run, targets: Targets, shares: dict[str, Any], kernels: dict[str, str], seconds: float
) -> None:
    device, metrics = run.world.device, run.metrics
    datasets = {"data": run.stream.dataset, "validation_data": run.validation}
    metrics.write(
        "start",
        device=_device_name(device),
        processes=run.world.size,
        steps=run.steps,
        seconds_to_prepare=seconds,
        model=shares,
        kernels=kernels,
        placement=str(run.plan),
        cuda_graphs=run.plan.records,
        memory=run.plan.memory,
        flops_per_token=run.flops.token,
        flops_per_trained_token=run.flops.trained_token,
        peak_flops=run.flops.peak,
        **{name: data.figures() if data else None for name, data in datasets.items()},
    )
    metrics.say(
        f"model: {shares['parameters']:,} parameters, {shares['trainable_parameters']:,} trained by LoRA on "
        f"{shares['adapted_layers']} of {shares['linear_layers']} linear layers, "
        f"{shares['adapted_expert_projections']} of {shares['expert_projections']} expert projections"
    )
    graphs = "; passes are recorded as CUDA graphs" if run.plan.records else ""
    metrics.say(f"base model: {run.plan}; on {run.world.size} processes{graphs}")
    metrics.say(
        f"kernels on {device.type}: " + "; ".join(f"{kind}: {name}" for kind, name in kernels.items())
    )
    for data in datasets.values():
        if data:
            metrics.say(
                "data: {name}: {examples} examples, {trained_tokens} of {tokens} tokens trained, "
                "{truncated} truncated, {dropped} left out".format(**data.figures())
            )
            if data.row_length is not None:
                metrics.say("packed: {rows} rows, {filled} of their tokens real".format(**data.figures()))
    for note in (*run.config.notes(), *targets.notes):
        metrics.note(note)
