"""What every contestant is asked to do, and what comes back. No torch is imported here."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DENSE = (
    "in_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "shared_experts.up_proj",
    "shared_experts.down_proj",
)
EXPERTS = ("experts.up_proj", "experts.down_proj")
"""As parameters of transformers' NemotronHExperts, for all experts of a block together."""


@dataclass(frozen=True)
class Work:
    """One contestant's turn. All take the model, seed and optimizer of `config`, our training config."""

    config: Path
    contestant: str
    adapters: str
    """dense: mamba in_proj, attention, shared experts; experts: the routed experts too."""
    seq_length: int
    batch: int
    """Sequences of one process in one step."""
    checkpointing: bool
    warmup: int
    """Steps before the clock starts, the first one included."""
    steps: int
    """Steps that are timed."""
    deadline: float
    """Seconds since 1970 after which no further step is begun."""
    overrides: tuple[str, ...] = ()
    """More for the training config, `section.key=value`."""
    profile: Path | None = None
    """Where the profile of two more steps goes, as JSON."""
    options: tuple[str, ...] = ()
    """For the contestant alone, as it reads them."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of what carries LoRA, in transformers' spelling."""
        return DENSE + (EXPERTS if self.adapters == "experts" else ())

    def config_overrides(self, processes: int) -> list[str]:
        """The training config's values that make it this work, for `trainer.reading.read_config`."""
        more = 2 if self.profile else 0
        steps = self.warmup + self.steps + more
        rows = self.batch * processes
        return [
            f"peft.target_modules=[{', '.join(self.targets)}]",
            "peft.match_all_linear=false",
            "dataset.kind=synthetic",
            "dataset.path_or_dataset_id=null",
            f"dataset.seq_length={self.seq_length}",
            f"dataset.examples={steps * rows}",
            "validation_dataset=null",
            f"step_scheduler.global_batch_size={rows}",
            f"step_scheduler.local_batch_size={self.batch}",
            f"step_scheduler.max_steps={steps}",
            "step_scheduler.val_every_steps=null",
            "step_scheduler.ckpt_every_steps=null",
            "lr_scheduler.lr_decay_style=constant",
            "lr_scheduler.lr_warmup_steps=0",
            f"distributed.activation_checkpointing={str(self.checkpointing).lower()}",
            "checkpoint.enabled=false",
            *self.overrides,
        ]

    def write(self, file: Path) -> None:
        """As JSON."""
        file.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def read(cls, file: Path) -> Work:
        """What `write` wrote."""
        fields = json.loads(file.read_text())
        profile = Path(fields.pop("profile")) if fields["profile"] else fields.pop("profile")
        for name in ("overrides", "options"):
            fields[name] = tuple(fields[name])
        return cls(**{**fields, "config": Path(fields["config"]), "profile": profile})


@dataclass(frozen=True)
class Measured:
    """What a contestant did. Of several processes, the first one's."""

    contestant: str
    machine: str
    versions: str
    precision: str
    trainable: int
    """Parameters."""
    prepare_seconds: float
    first_step_seconds: float
    step_seconds: list[float]
    tokens_per_step: int
    """Of all processes together."""
    peak_bytes: int
    """Allocated on the GPU; resident on a CPU."""
    reserved_bytes: int
    losses: list[float]
    notes: list[str] = field(default_factory=list)

    @property
    def median_seconds(self) -> float:
        """Of the timed steps."""
        return statistics.median(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """By the median step."""
        return self.tokens_per_step / self.median_seconds

    def write(self, file: Path) -> None:
        """As JSON."""
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> Measured:
        """What `write` wrote."""
        fields: dict[str, Any] = json.loads(file.read_text())
        return cls(**fields)
