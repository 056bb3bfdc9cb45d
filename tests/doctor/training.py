"""A small model's folder, data and config, written by hand; and an env that has this tree's trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from envbuilder.interpreter import inspect_interpreter
from envbuilder.lock import SourceLock, parse_lock
from envbuilder.model import ProvidedPackages
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.site import JobSpec, Site
from envbuilder.venv import make_venv
from tests.conftest import REPOSITORY, Quickstart
from tests.doctor.conftest import LOCK

RECIPE = Recipe(name="tiny", requirements=("tiny",))
SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% generation %}{% if m['role'] == 'assistant' %}{{ m['content'] + '<|end|>' }}{% endif %}"
    "{% endgeneration %}{% if m['role'] != 'assistant' %}{{ m['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
)
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
CONFIG = """\
device: cuda
model:
  pretrained_model_name_or_path: small
peft:
  target_modules: [q_proj, v_proj]
dataset:
  path_or_dataset_id: train.jsonl
  seq_length: 64
validation_dataset:
  path_or_dataset_id: validation.jsonl
  seq_length: 64
step_scheduler:
  global_batch_size: 2
  max_steps: 10
optimizer:
  lr: 1.0e-4
"""


def make_trainer_env(root: Root, quickstart: Quickstart) -> None:
    """The env `tiny` under `root`: this tree's trainer, and the quickstart env's torch and transformers."""
    there = inspect_interpreter(quickstart.python)
    folders = dict.fromkeys((str(there.purelib), str(there.platlib)))
    provided = ProvidedPackages(python=str(there.path), site_packages=tuple(folders), versions={})
    site_packages = make_venv(there, root.env("tiny"), provided)
    shutil.copytree(
        REPOSITORY / "trainer", site_packages / "trainer", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(quickstart.root / "envs" / "quickstart" / "envbuilder.json", root.env("tiny"))


def talk(*contents: str) -> str:
    """A line of data: user and assistant in turn."""
    roles = ("user", "assistant")
    return json.dumps({"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]})


def write_config(folder: Path, **changes: str) -> Path:
    """A right config with its model and data; `changes` replace one text by another, "old=new"."""
    (folder / "train.jsonl").write_text("".join(talk(f"{n}?", f"It is {n}.") + "\n" for n in range(8)))
    (folder / "validation.jsonl").write_text(talk("9?", "It is 9.") + "\n")
    write_model(folder / "small")
    text = CONFIG
    for change in changes.values():
        old, new = change.split("=", 1)
        assert old in text
        text = text.replace(old, new)
    file = folder / "config.yaml"
    file.write_text(text)
    return file


def write_model(folder: Path, *, template: str = TEMPLATE) -> None:
    """A llama of two layers in two shards, and a byte-level tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    h, i, v = LLAMA["hidden_size"], LLAMA["intermediate_size"], LLAMA["vocab_size"]
    shapes = {"model.embed_tokens.weight": [v, h], "model.norm.weight": [h], "lm_head.weight": [v, h]}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": [h, h] for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": [i, h] for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": [h, i]}
        shapes |= {f"{at}.{name}_layernorm.weight": [h] for name in ("input", "post_attention")}
    names = sorted(shapes)
    shards = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    for shard, inside in shards.items():
        (folder / shard).write_bytes(safetensors({name: shapes[name] for name in inside}))
    index = {"weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_tokenizer(folder, template)


def safetensors(shapes: dict[str, list[int]]) -> bytes:
    """A file of zeros in fp32."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def _write_tokenizer(folder: Path, template: str) -> None:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [n for n in range(256) if n not in printable]
    letters = sorted([chr(n) for n in printable] + [chr(256 + place) for place in range(len(others))])
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256 + n, "content": name, **plain} for n, name in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {letter: n for n, letter in enumerate(letters)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def lock_with_model(folder: Path) -> SourceLock:
    """A lock that names the files of the model in `folder` as they are now."""
    from envbuilder.bundle import hash_file

    files = "".join(
        f'[[tool.envbuilder.models.files]]\nname = "{path.name}"\nsize = {path.stat().st_size}\n'
        f'sha256 = "{hash_file(path)}"\n'
        for path in sorted(folder.iterdir())
    )
    model = (
        f'\n[[tool.envbuilder.models]]\nname = "{folder.name}"\nrepo = "owner/{folder.name}"\n'
        f'commit = "{"c" * 40}"\nremote-code = []\n{files}'
    )
    return parse_lock("tiny", LOCK.format(size=1000, digest="0" * 64, sha="a" * 64) + model)


def make_site(*, walltime: str, gpus: int = 0) -> Site:
    """A site whose training jobs have so many GPUs and so long."""
    request = "gres" if gpus else "none"
    build = JobSpec(partition="p", walltime="00:30:00", cpus=1, memory="1G")
    job = JobSpec(partition="p", walltime=walltime, cpus=1, memory="1G", gpus=gpus, gpu_request=request)
    return Site(name="lab", build=build, train=job)
