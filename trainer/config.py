"""The training config: what a YAML may say, with NeMo Automodel's section and key names.

Pure: no file is opened here. `reading.py` turns a YAML file into a `Config` and mistakes into lines and keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    model_validator,
)

DTYPE_NAMES = {
    "bf16": "bfloat16",
    "fp32": "float32",
    "torch.bfloat16": "bfloat16",
    "torch.float32": "float32",
}


def _relative_to_yaml(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder", Path.cwd())
    return Path(folder, path.expanduser()).resolve()


def _byte_or_folder(value: str, info: ValidationInfo) -> str:
    return value if value == "byte" else str(_relative_to_yaml(Path(value), info))


def _full_dtype_name(value: object) -> object:
    return DTYPE_NAMES.get(value, value) if isinstance(value, str) else value


def _one_name_is_a_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


LocalPath = Annotated[Path, AfterValidator(_relative_to_yaml)]
"""A path; a relative one starts at the YAML file's folder."""
Names = Annotated[tuple[str, ...], BeforeValidator(_one_name_is_a_list)]


class Section(BaseModel):
    """A section of the YAML: an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """A local checkpoint folder, or a transformers config to fill with random weights."""

    pretrained_model_name_or_path: LocalPath | None = None
    """Folder with `config.json` and safetensors files; nothing is downloaded and no code in it is run."""
    config: dict[str, Any] | None = None
    """A transformers config inline: `model_type` and its fields."""
    init: Literal["random"] | None = None
    dtype: Annotated[Literal["bfloat16", "float32"], BeforeValidator(_full_dtype_name)] = Field(
        default="bfloat16", validation_alias=AliasChoices("dtype", "torch_dtype")
    )
    tokenizer: Annotated[str, AfterValidator(_byte_or_folder)] | None = None
    """`byte` for the project's own byte-level tokenizer; a folder; by default the model's folder."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.pretrained_model_name_or_path is None) == (self.config is None):
            raise ValueError("give either pretrained_model_name_or_path or config (with init: random)")
        if self.config is not None and self.init != "random":
            raise ValueError("config needs `init: random`: there are no weights to load")
        if self.config is None and self.init is not None:
            raise ValueError("init: random goes with config, not with pretrained_model_name_or_path")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a model_type, for example nemotron_h")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("config needs a tokenizer: byte, or a folder")
        return self


class PeftSection(Section):
    """LoRA (arXiv:2106.09685) on linear layers and routed experts: y = Wx + alpha/dim · B(A(dropout(x)))."""

    dim: PositiveInt = 8
    """The rank r."""
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    use_rslora: bool = False
    """alpha/√dim in place of alpha/dim (arXiv:2312.03732)."""
    match_all_linear: bool = False
    """Every linear layer of the blocks, see `lora.py`."""
    match_routed_experts: bool = False
    """Every projection of the routed experts, beside what the other keys name."""
    target_modules: Names | None = None
    """Names or their endings (`q_proj`, `mixer.in_proj`, `experts.down_proj`), `*` stands for anything."""
    exclude_modules: Names = ()

    @model_validator(mode="after")
    def _one_way_of_naming(self) -> PeftSection:
        if self.match_all_linear == (self.target_modules is not None):
            raise ValueError("give either match_all_linear: true or target_modules")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules is empty")
        return self


class DatasetSection(Section):
    """Chat examples from a JSONL file, or random tokens for measuring."""

    kind: Literal["chat", "synthetic"] = "chat"
    path_or_dataset_id: LocalPath | None = None
    """JSONL, one `{"messages": [{"role", "content"}, …]}` a line."""
    seq_length: int = Field(default=2048, ge=2)
    """Tokens; a longer example is cut or left out as `overlong` says, and counted."""
    overlong: Literal["truncate", "drop"] = "truncate"
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Every assistant turn, the last assistant turn only, or every token but the first."""
    packing: bool = False
    """Several examples in a row of seq_length tokens, kept apart exactly; batch sizes count rows then."""
    shuffle: bool = True
    """A new order for each epoch, drawn from the seed; false: the file's own."""
    examples: PositiveInt = 64
    """How many examples kind: synthetic makes; each has seq_length tokens, all trained."""

    @model_validator(mode="after")
    def _chat_has_a_file(self) -> DatasetSection:
        if self.kind == "chat" and self.path_or_dataset_id is None:
            raise ValueError("path_or_dataset_id is missing")
        if self.kind == "synthetic" and self.path_or_dataset_id is not None:
            raise ValueError("kind: synthetic makes its own examples, path_or_dataset_id has no meaning")
        return self


class StepSchedulerSection(Section):
    """Batch sizes and how long to train; at least one of max_steps and num_epochs."""

    global_batch_size: PositiveInt
    """Examples for one optimizer step, over all processes and micro-batches."""
    local_batch_size: PositiveInt = 1
    """Examples in one forward pass of one process."""
    max_steps: PositiveInt | None = None
    num_epochs: PositiveInt | None = None
    val_every_steps: PositiveInt | None = None
    ckpt_every_steps: PositiveInt | None = None

    @model_validator(mode="after")
    def _ends(self) -> StepSchedulerSection:
        if self.max_steps is None and self.num_epochs is None:
            raise ValueError("give max_steps or num_epochs")
        return self


class OptimizerSection(Section):
    """Adam (arXiv:1412.6980), by default with decoupled weight decay (arXiv:1711.05101)."""

    name: Literal["adamw", "adam"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """The gradient's norm is clipped to this; null: no clipping."""


class LrSchedulerSection(Section):
    """Linear warm-up from `init_lr` to `lr`, then decay to `min_lr` at the last step."""

    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: Annotated[int, Field(ge=0)] | None = 0
    """null: a tenth of the steps, at most 1,000."""
    init_lr: float = Field(default=0.0, ge=0)
    min_lr: float = Field(default=0.0, ge=0)


class DistributedSection(Section):
    """How several processes share the work."""

    strategy: Literal["fsdp2"] = "fsdp2"
    placement: Literal["auto", "replicate", "shard"] = "auto"
    """The base model whole on every GPU, or shared by several; auto: whole where the memory is enough."""
    gathering: Literal["in_place", "fsdp2"] = "in_place"
    """How a shared block's weights come together: where they are computed with, or by PyTorch's FSDP2."""
    whole_blocks: NonNegativeInt | Literal["auto"] = "auto"
    """Of a shared base, how many blocks each process keeps whole; auto: as many as fit."""
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Computes each block again in the backward pass; auto: as many as the memory isn't enough without."""
    cuda_graphs: bool = True
    """Records a pass for each shape that batches have, where it can be, and starts it as a whole."""
    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """Take no more than so much of each GPU."""
    timeout_minutes: float = Field(default=10, gt=0)
    """With several processes: one that has done nothing for so long ends the run."""


class CheckpointSection(Section):
    """Checkpoints under the run's folder; each holds all that resuming needs."""

    enabled: bool = True
    every_minutes: float | None = Field(default=5, gt=0)
    """Beside `step_scheduler.ckpt_every_steps`; training goes on while one is written."""
    keep_last: PositiveInt = 2
    resume: bool = True
    spare_seconds: float = Field(default=20, ge=0)
    """Where the job's end is known: how long before it the last checkpoint is on the disk."""


class DivergenceSection(Section):
    """When training is given up because the loss rose and stays up."""

    rise: float | None = Field(default=2.0, gt=0)
    """Nats a token above the median of the last 50 steps; null: never."""
    steps: PositiveInt = 20
    """So many on end."""


class SamplesSection(Section):
    """Answers of the model before the first step and after the last, `samples.py`."""

    prompts: Names | None = None
    """What a user says; by default the first examples of the validation data; an empty list: no samples."""
    max_new_tokens: PositiveInt = 64


class LoggingSection(Section):
    """Curves beside `metrics.jsonl`, as files in the run's folder; `auto`: if the package is in the env."""

    tensorboard: bool | Literal["auto"] = "auto"
    wandb: bool | Literal["auto"] = "auto"
    """Offline: nothing is sent."""
    wandb_project: str = "envbuilder"
    wandb_name: str | None = None
    """Of the run, in Weights & Biases; without one, the run's own."""


class Config(Section):
    """A whole training config."""

    device: Literal["cpu", "cuda"] = "cuda"
    """`cpu` allows reference kernels. On `cuda` a missing kernel stops the run."""
    seed: int = Field(default=1, ge=0)
    deterministic: bool = False
    """The same bits in every run on the same kind and number of GPUs, at some cost in speed."""
    model: ModelSection
    peft: PeftSection
    dataset: DatasetSection
    validation_dataset: DatasetSection | None = None
    step_scheduler: StepSchedulerSection
    optimizer: OptimizerSection
    lr_scheduler: LrSchedulerSection = LrSchedulerSection()
    distributed: DistributedSection = DistributedSection()
    checkpoint: CheckpointSection = CheckpointSection()
    divergence: DivergenceSection = DivergenceSection()
    samples: SamplesSection = SamplesSection()
    logging: LoggingSection = LoggingSection()
    _notes: tuple[str, ...] = ()

    def model_post_init(self, context: Any, /) -> None:
        """Keeps what `nemo.py` found in the file that has no effect."""
        self._notes = (context or {}).get("notes", ())

    @model_validator(mode="after")
    def _validation_has_data(self) -> Config:
        if self.step_scheduler.val_every_steps is not None and self.validation_dataset is None:
            raise ValueError("step_scheduler.val_every_steps needs a validation_dataset")
        return self

    def notes(self) -> tuple[str, ...]:
        """What the config says that has no effect here."""
        return self._notes
