"""NeMo Automodel's YAML in this trainer's own words: its `_target_` lines, its other keys, its defaults.

Read in the recipes and sources of nemo-automodel 0.1 to 0.5. What means the same here is taken over; what
can't change the result is dropped, and said unless it asks for nothing; what would change it is a mistake.
A key without a rule here is left to `config.py`, which knows it or calls it unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.config import Config
from trainer.source import Key, Source

Tree = dict[str, Any]
NOTHING = (None, "none", "None")
"""How a YAML says that a key is not set."""


@dataclass(frozen=True)
class Moved:
    """It has another place here; in the sections that share rules, in the same one."""

    to: tuple[str, ...]
    values: Mapping[object, object] | None = None
    """What it is called here; a value that isn't in it stays where it is. None: the same."""
    silent: tuple[object, ...] = ()
    """Values that ask for nothing."""
    implies: Mapping[str, object] = field(default_factory=dict)
    """Keys beside `to` that it stands for."""
    yields: bool = False
    """If there is another value at `to`, that one counts, which is noted; else it is a mistake."""


@dataclass(frozen=True)
class Unused:
    """It can't change the result: dropped, with a note of the reason unless the value is in `silent`."""

    reason: str
    silent: tuple[object, ...] = ()


@dataclass(frozen=True)
class Only:
    """It would change the result: one of `values`, which is what happens here anyway, or a mistake."""

    values: tuple[object, ...]
    otherwise: str


Rule = Moved | Unused | Only

_FROM_PRETRAINED = ".NeMoAutoModelForCausalLM.from_pretrained"
_TOKENIZERS = (
    "transformers.AutoTokenizer.from_pretrained",
    "nemo_automodel.NeMoAutoTokenizer.from_pretrained",
    "nemo_automodel._transformers.auto_tokenizer.NeMoAutoTokenizer.from_pretrained",
)
_COLLATERS = (
    "nemo_automodel.components.datasets.utils.default_collater",
    "nemo_automodel.components.datasets.utils.packed_sequence_thd_collater",
)
_RECIPE = "TrainFinetuneRecipeForNextTokenPrediction"

TARGETS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    f"nemo_automodel{_FROM_PRETRAINED}": ("model", {}),
    f"nemo_automodel._transformers{_FROM_PRETRAINED}": ("model", {}),
    f"nemo_automodel._transformers.auto_model{_FROM_PRETRAINED}": ("model", {}),
    "transformers.AutoModelForCausalLM.from_pretrained": ("model", {}),
    "nemo_automodel.components._peft.lora.PeftConfig": ("peft", {}),
    "nemo_automodel.components.datasets.llm.ChatDataset": ("dataset", {"kind": "chat"}),
    "nemo_automodel.components.datasets.llm.chat_dataset.ChatDataset": ("dataset", {"kind": "chat"}),
    "nemo_automodel.components.distributed.fsdp2.FSDP2Manager": ("distributed", {"strategy": "fsdp2"}),
    "nemo_automodel.components.distributed.config.FSDP2Config": ("distributed", {"strategy": "fsdp2"}),
    "nemo_automodel.components.distributed.ddp.DDPManager": ("distributed", {"placement": "replicate"}),
    "nemo_automodel.components.distributed.config.DDPConfig": ("distributed", {"placement": "replicate"}),
    # torch's own defaults of weight_decay, which differ between the two.
    "torch.optim.AdamW": ("optimizer", {"name": "adamw", "weight_decay": 0.01}),
    "torch.optim.Adam": ("optimizer", {"name": "adam", "weight_decay": 0.0}),
    "torch.optim.adamw.AdamW": ("optimizer", {"name": "adamw", "weight_decay": 0.01}),
    "torch.optim.adam.Adam": ("optimizer", {"name": "adam", "weight_decay": 0.0}),
    "nemo_automodel.components.training.rng.StatefulRNG": ("rng", {}),
    "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy": ("loss_fn", {}),
    "nemo_automodel.components.loss.chunked_ce.ChunkedCrossEntropy": ("loss_fn", {}),
    "nemo_automodel.components.loss.linear_ce.FusedLinearCrossEntropy": ("loss_fn", {}),
    "nemo_automodel.components.loss.te_parallel_ce.TEParallelCrossEntropy": ("loss_fn", {}),
    "torchdata.stateful_dataloader.StatefulDataLoader": ("dataloader", {}),
    "torch.utils.data.DataLoader": ("dataloader", {}),
    "nemo_automodel.components.moe.parallelizer.parallelize_model": ("parallelizer", {}),
}
"""`_target_` → the section it belongs in and the keys it stands for here.

nemo-automodel 0.1 had its modules without `components`: those paths are looked up with it.
"""

SAME_RULES = {"validation_dataset": "dataset", "validation_dataloader": "dataloader"}

_LOADED_HERE = "data is loaded by the trainer's own loader"
_SIZES = "every process has its own part of the batch; run as many as there are GPUs"
_PLACED_HERE = "weights are placed by the trainer"
_NO_SERVICE = "metrics go to metrics.jsonl in the run's folder, nothing is sent"
_LAUNCH = "jobs are started by `envbuilder train` and `envbuilder slurm`"
_RUN_FOLDER = "everything is written under the run's folder"
_KERNELS = "kernels are chosen by the trainer and shown at the start"
_QUANTIZED = "the base stays in model.dtype: quantized training is not there"
_FILE = "a local file is taken whole"

RULES: Mapping[str, Rule] = {
    "recipe": Only((_RECIPE, f"nemo_automodel.recipes.llm.train_ft.{_RECIPE}"), "only fine-tuning is there"),
    "step_scheduler.gc_every_steps": Unused("Python collects its garbage itself"),
    "step_scheduler.log_remote_every_steps": Unused(_NO_SERVICE),
    "step_scheduler.save_checkpoint_every_epoch": Unused("ckpt_every_steps counts", (False,)),
    "dist_env.backend": Unused("NCCL on GPUs, gloo on CPUs", ("nccl",)),
    "dist_env.timeout_minutes": Moved(("distributed", "timeout_minutes")),
    "rng.seed": Moved(("seed",), yields=True),  # NeMo Automodel reads `seed`
    "rng.ranked": Unused("every process has its own dropout, and all the same adapters", (True,)),
    "model.trust_remote_code": Unused("no remote code is run, the model is native in transformers", (False,)),
    "model.backend.fake_balanced_gate": Only((False,), "the router is the model's own"),
    "model.backend.te_fp8": Only((), _QUANTIZED),
    "model.backend": Unused(_KERNELS),
    "model.force_hf": Unused("the model is always transformers' own", (True,)),
    "model.use_liger_kernel": Unused(_KERNELS, (False,)),
    "model.use_sdpa_patching": Unused(_KERNELS),
    "model.cache_dir": Unused("nothing is downloaded"),
    "model.load_base_model": Only((True,), "random weights are made by config and init: random"),
    "model.output_hidden_states": Unused("the loss is computed from the last hidden states anyway", (False,)),
    "model.quantization_config": Only((), _QUANTIZED),
    "peft.use_triton": Unused(_KERNELS, (False,)),
    "peft.use_memory_efficient_lora": Unused("LoRA is computed by the trainer's own rule"),
    "peft.use_dora": Only((False,), "DoRA is not there"),
    "peft.dropout_position": Only(("pre",), "dropout is on the adapter's input (pre) here"),
    "peft.lora_A_init": Only(("uniform", "kaiming"), "A begins kaiming-uniform (uniform) here"),
    "peft.lora_dtype": Unused("adapters are trained in fp32"),
    "peft.moe_rank_scaling": Only((False,), "the rank is the same everywhere"),
    "dataset.split": Unused(_FILE),
    "dataset.name": Unused(_FILE),
    "dataset.shuffle_seed": Unused(_FILE),
    "dataset.padding": Unused("sequences are padded to the longest of their batch", ("do_not_pad", False)),
    "dataset.truncation": Unused("`overlong` says what becomes of an example longer than seq_length"),
    "dataset.start_of_turn_token": Unused("turns are found in the chat template"),
    "dataset.chat_template": Only((), "put the template into the tokenizer's folder, chat_template.jinja"),
    "dataset.mask_reasoning_content": Only((False,), "all that the assistant says is trained"),
    "dataset.mask_history": Moved(("dataset", "train_on"), {True: "last", False: "assistant"}),
    "dataset.unshifted": Only((False,), "each token is predicted from those before it"),
    "dataset.skip_invalid_samples": Unused("a broken line stops the run and is named", (False,)),
    "dataset.tokenizer._target_": Only(_TOKENIZERS, "the tokenizer is transformers' own"),
    "dataset.tokenizer.pretrained_model_name_or_path": Moved(("model", "tokenizer")),
    "dataset.tokenizer.trust_remote_code": Unused("no remote code is run", (False,)),
    "dataset.tokenizer.use_fast": Only((True,), "only fast tokenizers are taken"),
    "dataset.tokenizer": Only((), "give its folder as model.tokenizer"),
    "tokenizer._target_": Only(_TOKENIZERS, "the tokenizer is transformers' own"),
    "tokenizer.pretrained_model_name_or_path": Moved(("model", "tokenizer")),
    "tokenizer.trust_remote_code": Unused("no remote code is run", (False,)),
    "packed_sequence.packed_sequence_size": Moved(
        ("dataset", "seq_length"), silent=(0,), implies={"packing": True}
    ),
    "packed_sequence.split_across_pack": Only((False,), "an example stays whole"),
    "packed_sequence.packing_strategy": Unused("the examples in a row are kept apart exactly"),
    "dataloader.shuffle": Moved(("dataset", "shuffle")),
    "validation_dataloader.shuffle": Unused("the order doesn't matter to validation", (False,)),
    "dataloader.collate_fn": Only(_COLLATERS, "sequences are padded on the right, see data.py"),
    "dataloader.batch_size": Unused("step_scheduler.local_batch_size counts"),
    "dataloader.drop_last": Unused("the stream of examples goes on from epoch to epoch", (False,)),
    "dataloader.num_workers": Unused(_LOADED_HERE, (0,)),
    "dataloader.pin_memory": Unused(_LOADED_HERE),
    "dataloader.persistent_workers": Unused(_LOADED_HERE),
    "dataloader.prefetch_factor": Unused(_LOADED_HERE),
    "optimizer.foreach": Unused(_KERNELS),
    "optimizer.fused": Unused(_KERNELS),
    "optimizer.amsgrad": Only((False,), "AMSGrad is not there"),
    "optimizer.maximize": Only((False,), "the loss is minimized"),
    "clip_grad_norm.max_norm": Moved(("optimizer", "max_grad_norm")),
    "loss_fn.fp32_upcast": Only((True,), "logits are taken to fp32"),
    "loss_fn.ignore_index": Only((-100,), "labels are the trainer's own"),
    "loss_fn.reduction": Only(("sum",), "the loss is summed, and divided by the batch's trained tokens"),
    "loss_fn.logit_softcapping": Only((0,), "logits are not capped"),
    "loss_fn.chunk_len": Unused("chunks have the trainer's own size"),
    "loss_fn.compile": Unused("chunks are computed by the trainer's own rule"),
    "distributed.strategy": Moved(("distributed", "placement"), {"ddp": "replicate"}),
    "distributed.dp_size": Unused(_SIZES),
    "distributed.dp_replicate_size": Unused(_PLACED_HERE, (1,)),
    "distributed.tp_size": Only((1,), f"tensor parallelism is not there: {_SIZES}"),
    "distributed.pp_size": Only((1,), f"pipeline parallelism is not there: {_SIZES}"),
    "distributed.cp_size": Only((1,), f"context parallelism is not there: {_SIZES}"),
    "distributed.ep_size": Unused("experts are placed like all other weights", (1,)),
    "distributed.sequence_parallel": Unused("it goes with tensor parallelism", (False,)),
    "distributed.defer_fsdp_grad_sync": Unused(_PLACED_HERE),
    "distributed.reshard_after_forward": Unused(_PLACED_HERE),
    "distributed.moe": Unused(_PLACED_HERE),
    "distributed.pipeline": Unused("pipeline parallelism is not there"),
    "parallelizer.activation_checkpointing": Moved(("distributed", "activation_checkpointing")),
    "checkpoint.checkpoint_dir": Unused(_RUN_FOLDER),
    "checkpoint.model_save_format": Only(("safetensors",), "only safetensors files are written"),
    "checkpoint.save_consolidated": Unused("the adapter is always written whole, in PEFT's format", (False,)),
    "checkpoint.restore_from": Only((), "a run goes on from the newest checkpoint of its own folder"),
    "checkpoint.is_async": Unused("a checkpoint is the adapter and its optimizer: written at once", (False,)),
    "checkpoint.dequantize_base_checkpoint": Unused("the base is not quantized"),
    "checkpoint.best_metric_key": Unused("the newest checkpoints are kept, keep_last of them"),
    "compile.enabled": Unused("nothing is compiled by torch.compile", (False,)),
    "fp8.enabled": Only((False,), _QUANTIZED),
    "qat.enabled": Only((False,), _QUANTIZED),
    "quantization.load_in_4bit": Only((False,), _QUANTIZED),
    "quantization.load_in_8bit": Only((False,), _QUANTIZED),
    "longalign": Only((False,), "it is not there"),
    "wandb.project": Moved(("logging", "wandb_project")),
    "wandb.name": Moved(("logging", "wandb_name")),
    "wandb.mode": Moved(("logging", "wandb"), {"disabled": False, "offline": "auto"}, silent=("offline",)),
    "wandb.dir": Unused(_RUN_FOLDER),
    "wandb.save_dir": Unused(_RUN_FOLDER),
    "wandb.entity": Unused("`wandb sync --entity` takes it"),
    "wandb": Unused("runs are written offline, and `wandb sync` sends them"),
    "mlflow": Unused(_NO_SERVICE),
    "comet": Unused(_NO_SERVICE),
    "slurm": Unused(_LAUNCH),
    "launcher": Unused(_LAUNCH),
    "ci": Unused("it is for the tests of NeMo Automodel"),
    "benchmark": Unused("benchmarks/train.py measures"),
    "prewarm": Unused(_KERNELS),
    "nvtx": Unused("nothing is marked for a profiler", (False,)),
}
"""Dotted key → what becomes of it. The rule of a section holds for what its keys' own rules leave."""

SWITCHED_OFF = ("compile", "fp8", "qat", "quantization")
"""Sections whose other keys say nothing once their switch is settled."""
SECTIONS = {name.partition(".")[0] for name in RULES} - set(Config.model_fields) - set(SAME_RULES)


def translate(tree: Tree, source: Source) -> tuple[str, ...]:
    """Makes `tree`, a file's sections, what `Config` takes; mistakes go to `source`. Gives what to note."""
    notes: list[str] = []
    sections = [section for section in tree.values() if isinstance(section, dict)]
    of_nemo = any(str(section.get("_target_")).startswith("nemo_automodel.") for section in sections)
    for name in list(tree):
        if isinstance(tree[name], dict):
            _map_target(tree, name, source)
    _apply_rules(tree, tree, (), source, notes)
    for name in [name for name in tree if name in SECTIONS | {"validation_dataloader"}]:
        section = tree.pop(name)
        if name not in SWITCHED_OFF and isinstance(section, dict):
            for key in section:
                source.mistake((name, key), "unknown key")
    if of_nemo:
        notes += _take_its_defaults(tree)
    return tuple(notes)


def _map_target(tree: Tree, name: str, source: Source) -> None:
    """Replaces the section's `_target_` by the keys it stands for."""
    section = tree[name]
    place = SAME_RULES.get(name, name)
    if "_target_" not in section or f"{name}._target_" in RULES or name in RULES:
        return
    target = str(section.pop("_target_"))
    older = target.replace("nemo_automodel.", "nemo_automodel.components.", 1)
    wanted, implied = TARGETS.get(target) or TARGETS.get(older) or (None, {})
    if wanted != place:
        known = sorted(key for key, (section_name, _) in TARGETS.items() if section_name == place)
        hint = f"known here: {', '.join(known)}" if known else "this section takes no _target_"
        source.refuse((name,), (name, "_target_"), f"{target} is not supported; {hint}")
        return
    for key, value in implied.items():
        section.setdefault(key, value)


def _apply_rules(section: Tree, tree: Tree, key: Key, source: Source, notes: list[str]) -> None:
    """What `RULES` say of the keys below `key`, the deepest first."""
    for name in list(section):
        below, value = (*key, name), section[name]
        if isinstance(value, dict) and value:
            _apply_rules(value, tree, below, source, notes)
            if not value:
                del section[name]
                continue
        rule = _rule_of(below)
        if rule is None or (isinstance(rule, Moved) and rule.values and value not in tuple(rule.values)):
            continue
        del section[name]
        if isinstance(value, dict) and "_target_" in value:
            value = value["_target_"]
        if value in NOTHING:
            continue
        if isinstance(rule, Moved) and value not in rule.silent:
            _move(value, tree, below, rule, source, notes)
        elif isinstance(rule, Unused) and value not in rule.silent:
            notes.append(f"{_dotted(below)}: has no effect: {rule.reason}")
        elif isinstance(rule, Only) and value not in rule.values:
            source.mistake(below, f"{value} is not supported: {rule.otherwise}")


def _rule_of(key: Key) -> Rule | None:
    first = str(key[0])
    return RULES.get(_dotted(key)) or RULES.get(_dotted((SAME_RULES.get(first, first), *key[1:])))


def _move(value: object, tree: Tree, key: Key, rule: Moved, source: Source, notes: list[str]) -> None:
    """Puts the value where it belongs; `--set` wins over the file, two values in one file are a mistake."""
    section, place = str(key[0]), tree
    to = (section, *rule.to[1:]) if SAME_RULES.get(section) == rule.to[0] else rule.to
    value = rule.values[value] if rule.values else value
    for name in to[:-1]:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            return  # a mistake that Config tells
    there, new = source.lines.get(to), source.line_of(key)
    if to[-1] in place and place[to[-1]] != value:
        if there == 0:
            return
        if new != 0 and rule.yields:
            notes.append(f"{_dotted(key)}: has no effect: {_dotted(to)} is {place[to[-1]]}")
            return
        if new != 0:
            source.mistake(key, f"is {value}, but {_dotted(to)} is {place[to[-1]]}")
            return
    place |= {to[-1]: value, **rule.implies}
    source.lines[to] = new


def _take_its_defaults(tree: Tree) -> list[str]:
    """Where NeMo Automodel takes something else for a key that is not given than this trainer does."""
    notes = []
    model, peft, dataset, scheduler, steps, optimizer = (
        section if isinstance(section := tree.get(name), dict) else {}
        for name in ("model", "peft", "dataset", "lr_scheduler", "step_scheduler", "optimizer")
    )
    for key in ("dtype", "torch_dtype"):
        if model.get(key) == "auto":
            del model[key]
            notes.append(f"model.{key}: auto is bfloat16 here, whatever the checkpoint has")
    if peft.get("exclude_modules") and not peft.get("target_modules"):
        peft["match_all_linear"] = True
    if peft.get("dropout"):
        notes.append("peft.dropout: is on the adapter's input here, on its output in NeMo Automodel")
    if dataset and "seq_length" not in dataset:
        notes.append("dataset.seq_length: is not given, so longer examples are cut: they are counted below")
    if scheduler and isinstance(optimizer.get("lr"), float):
        scheduler.setdefault("lr_decay_style", "cosine")
        scheduler.setdefault("lr_warmup_steps", None)
        scheduler.setdefault("init_lr", optimizer["lr"] * 0.1)
        scheduler.setdefault("min_lr", optimizer["lr"] * 0.01)
    if steps.get("val_every_steps") is not None and not tree.get("validation_dataset"):
        del steps["val_every_steps"]
        notes.append("step_scheduler.val_every_steps: has no effect: there is no validation_dataset")
    return notes


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))
