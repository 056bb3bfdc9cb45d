"""The model of a training config: its files, tokenizer, template, and the memory that it takes."""

from __future__ import annotations

from pathlib import Path

from envbuilder.bundle import hash_file
from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.checks.inspected import LIMIT_S, MARK, NEEDS, Parts, reads
from envbuilder.doctor.evidence import shown
from envbuilder.doctor.former_runs import Speed, former_training
from envbuilder.doctor.subject import Subject
from envbuilder.lock import MODELS
from envbuilder.provided_models import own_copy
from envbuilder.report import Reporter
from envbuilder.slurm_time import seconds_of, spoken

GIB = 2**30
FULL = 0.9
"""Of a GPU's memory: above it, what the estimate can't know decides."""
_NO_FILES = "The config makes random weights: there are no files."
_NO_TOKENIZER = "There is no tokenizer to try: see model.tokenizer."
_NO_MODEL = "The model's layers aren't known: see model.layers."


@reads("config", without="", files=True)
def check_config(subject: Subject, parts: Parts) -> Outcome:
    """The config as the trainer reads it."""
    config = parts["config"]
    evidence = [f"{key}: {config[key]}" for key in ("device", "model", "dtype", "seq_length") if config[key]]
    return ok("The trainer takes the config.", str(subject.config), *evidence, *config["notes"])


@reads("weights", without=_NO_FILES, files=True)
def check_weights(subject: Subject, parts: Parts) -> Outcome:
    """The index, that every shard is there, and each header against the file's size."""
    weights, folder = parts["weights"], Path(parts["config"]["model"])
    if weights["problems"]:
        return failed(
            f"The weights in {folder} can't be loaded: {weights['problems'][0]}.",
            *shown(weights["problems"]),
            remedy=_bring_again(subject, folder),
        )
    return ok(
        "All weight files are there and whole, by their headers.",
        f"{folder}: {weights['files']} files, {weights['tensors']} tensors, {_gib(weights['bytes'])}",
    )


def check_lock(subject: Subject, reporter: Reporter) -> Outcome:
    """Names and sizes of the model's files against the lock."""
    return _against_lock(subject, hash_all=False)


def check_bytes(subject: Subject, reporter: Reporter) -> Outcome:
    """Every byte of the model's files against the lock."""
    return _against_lock(subject, hash_all=True)


def _against_lock(subject: Subject, *, hash_all: bool) -> Outcome:
    found = subject.config_files
    if found.problem or found.error_of("config"):
        return skipped("The trainer can't look into the config: see model.config.")
    if not found.parts["config"]["model"]:
        return skipped(_NO_FILES)
    folder = Path(found.parts["config"]["model"])
    locked = subject.locked_model(folder)
    if locked is None:
        return skipped(
            f"The lock names no model {folder.name}, so there is nothing to hold {folder} against."
        )
    faults = []
    for file in locked.files:
        path = folder / file.name
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif (size := path.stat().st_size) != file.size:
            faults.append(f"{path}: expected {file.size} bytes, got {size}")
        elif hash_all and (sha256 := hash_file(path)) != file.sha256:
            faults.append(f"{path}: expected sha256 {file.sha256}, got {sha256}")
    if faults:
        return failed(
            f"{len(faults)} of {len(locked.files)} files of {locked.name} are not what the lock names.",
            locked.origin,
            *shown(faults),
            remedy=_bring_again(subject, folder),
        )
    what = "bytes" if hash_all else "sizes"
    right = f"All {len(locked.files)} files of {locked.name} have the locked {what}."
    return ok(right, str(folder), locked.origin)


def _bring_again(subject: Subject, folder: Path) -> str:
    """What brings the model's files once more."""
    assert subject.recipe is not None
    bundled = subject.root.bundle(subject.recipe.name) / MODELS / folder.name
    fetch = f"envbuilder fetch {subject.recipe_file} --verify"
    if folder.resolve() == bundled.resolve():
        return fetch
    model = subject.locked_model(folder)
    if model and model.name in subject.provided_models:
        copy = own_copy(subject.recipe.name, model)
        return f"Ask the owner of {folder} to put the model right (ls -lL {folder}); or {copy}"
    if model:
        return f"{fetch} && cp -rL {bundled}/. {folder}/"
    return (
        f"ls -l {folder}  # copy the folder again from where it came: rsync -a --checksum SOURCE/ {folder}/"
    )


@reads("tokenizer", without=_NO_TOKENIZER)
def check_tokenizer(subject: Subject, parts: Parts) -> Outcome:
    """The tokenizer, opened without a network, and its special tokens."""
    tokenizer = parts["tokenizer"]
    evidence = [f"{tokenizer['class']}: {tokenizer['tokens']} tokens"]
    evidence += [f"{name}: {token}" for name, token in tokenizer["special"].items()]
    where = "in tokenizer_config.json of the tokenizer's folder"
    if not tokenizer["has_padding"]:
        return failed(
            "The tokenizer has neither a padding nor an end token, so no batch can be padded.",
            *evidence,
            remedy=f'Name an end token ("eos_token") {where}',
        )
    if tokenizer["unknown_special"]:
        return failed(
            f"Special tokens are not in the vocabulary: {', '.join(tokenizer['unknown_special'])}.",
            *evidence,
            remedy=f"Correct them {where}",
        )
    if not tokenizer["has_end"]:
        return warning(
            "The tokenizer names no end token: nothing tells a model that it has answered.",
            *evidence,
            remedy=f'Name an end token ("eos_token") {where}',
        )
    return ok("The tokenizer opens without a network and has its special tokens.", *evidence)


@reads("template", without=_NO_TOKENIZER)
def check_template(subject: Subject, parts: Parts) -> Outcome:
    """What of a conversation is trained, by the chat template and the trainer's own rule."""
    talks = parts["template"]["talks"]
    marked = parts["template"]["marks_generation"]
    how = (
        "the template's {% generation %} markers say what is trained"
        if marked
        else "the template has no {% generation %} markers: what each assistant turn adds is trained"
    )
    evidence = [how, *(f"{name}: {_told(talk)}" for name, talk in talks.items())]
    one, two = talks["one turn"], talks["two turns"]
    if "broken" in one:
        return failed(
            "The chat template can't render a question and its answer.",
            *evidence,
            remedy="Bring the model's own chat template (chat_template.jinja) into the tokenizer's folder",
        )
    if "inexact" in one or one["trained"] == 0 or two.get("trained") == 0:
        return failed(
            "By the chat template, no token of an answer would be trained.",
            *evidence,
            remedy=MARK,
        )
    if "broken" in two or "inexact" in two or two["trained"] <= one["trained"]:
        return warning(
            "The chat template renders earlier turns differently: conversations of several turns are "
            "refused, or trained in part.",
            *evidence,
            remedy=f"{MARK}, or split the data into conversations of one turn",
        )
    return ok("The chat template renders, and the assistant's tokens are told apart exactly.", *evidence)


def _told(talk: Parts) -> str:
    if "tokens" in talk:
        return f"{talk['trained']} of {talk['tokens']} tokens trained: {talk['trained_text']!r}"
    return str(talk.get("inexact") or talk["broken"])


@reads("model", without=_NO_MODEL)
def check_layers(subject: Subject, parts: Parts) -> Outcome:
    """The model's family, its vocabulary, and where LoRA goes."""
    model, seq_length = parts["model"], parts["config"]["seq_length"]
    evidence = (
        f"{model['model_type']}: vocabulary of {model['vocab_size']}",
        f"LoRA on {model['adapted_layers']} of {model['linear_layers']} linear layers",
        *model["notes"],
    )
    if model["max_positions"] and seq_length > model["max_positions"]:
        return warning(
            f"Sequences of {seq_length} tokens are longer than the model was made for "
            f"({model['max_positions']}).",
            *evidence,
            remedy=f"--set dataset.seq_length={model['max_positions']}",
        )
    return ok("The trainer knows the model, and every target of LoRA is there.", *evidence)


@reads("memory", without=_NO_MODEL)
def check_memory(subject: Subject, parts: Parts) -> Outcome:
    """The estimate of what one GPU must hold, against what it has."""
    memory, on_cpu = parts["memory"], parts["config"]["device"] == "cpu"
    peak = memory["peak_bytes"]
    estimate = f"{_gib(peak)} ± {_gib(memory['uncertain_bytes'])}"
    evidence = [
        f"{subject.processes} processes, {memory['tokens_per_pass']:,} tokens in a pass of each",
        f"weights: {_gib(memory['weights_bytes'])} of {_gib(memory['base_bytes'])} "
        f"({memory['parameters']:,} parameters)",
        f"adapters, their gradients and optimizer: {_gib(memory['adapters_bytes'])} "
        f"({memory['trainable_parameters']:,} parameters x 16 bytes)",
        f"activations kept for the backward pass: {_gib(memory['activations_bytes'])}",
        f"the larger of a chunk of logits ({_gib(memory['logits_bytes'])}) and one block's work "
        f"({_gib(memory['working_bytes'])})",
        f"CUDA context and buffers: {_gib(memory['other_bytes'])}",
        f"while the weights are loaded: {_gib(memory['loading_bytes'])}",
    ]
    has, why_not = _gpu_bytes(subject)
    if on_cpu or has is None:
        reason = "the config trains on the CPU" if on_cpu else why_not
        return ok(f"Training takes about {estimate} for each process; {reason}.", *evidence)
    evidence.append(f"the GPU has {_gib(has)}")
    less = (
        "--set step_scheduler.local_batch_size=1 --set distributed.activation_checkpointing=true, "
        "or a smaller dataset.seq_length"
    )
    if memory["least_bytes"] > has:
        return failed(
            f"The weights and adapters alone take {_gib(memory['least_bytes'])}, the GPU has {_gib(has)}.",
            *evidence,
            remedy="Take more GPUs and --set distributed.placement=auto, GPUs with more memory, or a smaller "
            "model",
        )
    if peak > FULL * has:
        return warning(
            f"Training takes about {estimate} of the GPU's {_gib(has)}: it may not fit.",
            *evidence,
            remedy=less,
        )
    return ok(f"Training takes about {estimate} of the GPU's {_gib(has)}.", *evidence)


def _gpu_bytes(subject: Subject) -> tuple[int | None, str]:
    """Memory of the smallest GPU that will train; or why it isn't known."""
    if subject.site and not subject.is_in_job:
        if told := subject.site.train.gpu_memory_bytes:
            return told, ""
        return None, "what the GPUs of the site's jobs have is not known here"
    sizes = [int(gpu.memory_mib) for gpu in subject.gpus.devices if gpu.memory_mib.isdigit()]
    return (min(sizes) * 2**20, "") if sizes else (None, "there is no GPU here to hold it against")


@reads("steps", without="There are no examples to count steps of: see data.tokens.")
def check_steps(subject: Subject, parts: Parts) -> Outcome:
    """How many steps, and how many jobs of the site's walltime they take."""
    steps, batch = parts["steps"], parts["batch"].get("error")
    evidence = [
        f"{steps['steps']:,} steps of {steps['tokens_per_step']:,} tokens: {steps['epochs']} epochs of "
        f"{steps['examples']:,} examples"
    ]
    if batch:
        return failed(batch["message"], *evidence, remedy=batch["remedy"])
    former = former_training(subject, parts)
    total = f"{steps['steps']:,} steps, {steps['steps'] * steps['tokens_per_step']:,} tokens"
    if former is None:
        return ok(f"Training takes {total}; no former run tells how long.", *evidence)
    speed, seconds = former
    evidence.append(f"{speed.run}: {speed.tokens_per_second:,.0f} tokens/s, {spoken(speed.start_s)} to start")
    walltime = seconds_of(subject.site.train.walltime) if subject.site else None
    if walltime is None:
        return ok(f"Training takes {total}: about {spoken(seconds)}; no site gives a walltime.", *evidence)
    return _within(subject, seconds, speed, walltime, evidence, checkpoints=parts["config"]["checkpoints"])


def _within(
    subject: Subject,
    seconds: float,
    speed: Speed,
    walltime: int,
    evidence: list[str],
    *,
    checkpoints: bool,
) -> Outcome:
    assert subject.site is not None
    site = subject.site
    evidence.append(f"{site.name}: a walltime of {site.train.walltime}")
    takes = f"Training takes about {spoken(seconds)}"
    usable = walltime - speed.start_s
    if seconds <= usable:
        return ok(f"{takes}, within one job of {spoken(walltime)}.", *evidence)
    longer = f"Raise walltime in [train] of the site {site.name}, if its queue allows"
    if usable <= 0 or not checkpoints:
        why = "a job ends before its first step does" if usable <= 0 else "checkpoint.enabled is false"
        return failed(
            f"{takes}, a job ends after {spoken(walltime)}, and {why}: it will never finish.",
            *evidence,
            remedy=longer if usable <= 0 else "--set checkpoint.enabled=true",
        )
    jobs = -int(-seconds // usable)
    return warning(
        f"{takes}: {jobs} jobs of {spoken(walltime)}, one after the other.",
        *evidence,
        remedy=f"{longer}; or give the same train command {jobs} times: it goes on from its checkpoint",
    )


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= 0.05 * GIB else f"{count / 2**20:.1f} MiB"


CHECKS: tuple[Check, ...] = (
    Check(
        "model.config",
        "the training config",
        "whether the env's own trainer takes the config: keys, values, what goes together",
        check_config,
        needs=NEEDS,
        limit_s=LIMIT_S,
    ),
    Check(
        "model.lock",
        "the model's list of files",
        "names and sizes of the model's files against the lock",
        check_lock,
        needs=NEEDS,
        limit_s=LIMIT_S,
    ),
    Check(
        "model.bytes",
        "the model's files",
        "every byte of the model's files against the lock",
        check_bytes,
        needs=NEEDS,
        cost="rehash",
        limit_s=3600,
    ),
    Check(
        "model.weights",
        "the weight files",
        "the safetensors index and headers: each shard is there and as long as its header says",
        check_weights,
        needs=NEEDS,
        limit_s=LIMIT_S,
    ),
    Check(
        "model.tokenizer",
        "the tokenizer",
        "whether it opens without a network, and its special tokens",
        check_tokenizer,
        needs=(*NEEDS, "addresses"),
        limit_s=LIMIT_S,
    ),
    Check(
        "model.template",
        "the chat template",
        "whether it renders, and which tokens of a conversation would be trained",
        check_template,
        needs=(*NEEDS, "addresses"),
        limit_s=LIMIT_S,
    ),
    Check(
        "model.layers",
        "the model's layers",
        "the model's family, its vocabulary against the tokenizer's, and the layers that LoRA goes on",
        check_layers,
        needs=(*NEEDS, "addresses"),
        limit_s=LIMIT_S,
    ),
    Check(
        "model.memory",
        "the memory for training",
        "an estimate from the model's layers, LoRA, batch and sequence length, against the GPU's memory",
        check_memory,
        needs=(*NEEDS, "addresses"),
        limit_s=LIMIT_S,
    ),
    Check(
        "model.steps",
        "the steps of the training",
        "their number; with a former run's speed and a site, how many jobs of its walltime they take",
        check_steps,
        needs=(*NEEDS, "addresses"),
        limit_s=LIMIT_S,
    ),
)
