"""Weights from the hub's layout and transformers' own, whole and in slices, against transformers itself."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from transformers import AutoConfig, AutoModelForCausalLM

from trainer import loading
from trainer.config import ModelSection
from trainer.errors import ConfigError
from trainer.kernels import find_mamba_kernels
from trainer.loading import load_weights, named_tensors
from trainer.model import blocks_of, build_model, empty_model, fill, model_config
from trainer.parallel import World
from trainer.reading import read_config
from trainer.sharding import SharedParameter, shard_with_fsdp2, share

CPU = torch.device("cpu")
READ = loading._Readers.read
NO_KERNELS = find_mamba_kernels("cpu")
ODD = ["model.config.vocab_size=265", "model.config.n_routed_experts=5"]
"""Numbers of rows that two processes can't share evenly."""


def hub_folder(causal_lm: Any, folder: Path, *, shards: bool = True) -> Path:
    """The model as transformers saves it: the hub's layout, in several files."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in named_tensors(causal_lm).values():  # norms and buffers too: no two are equal
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    causal_lm.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    return folder


@pytest.fixture
def hub(config_file: Path, tmp_path: Path) -> Path:
    section = read_config(config_file, ODD).model
    return hub_folder(build_model(section, model_config(section), NO_KERNELS, CPU, seed=3), tmp_path / "hub")


def of_folder(folder: Path, dtype: str = "float32") -> ModelSection:
    return ModelSection(pretrained_model_name_or_path=folder, dtype=dtype, tokenizer="byte")


def load(folder: Path, dtype: str = "float32") -> Any:
    section = of_folder(folder, dtype)
    return build_model(section, model_config(section), NO_KERNELS, CPU, seed=1)


def assert_equal(ours: Any, theirs: Any) -> None:
    """Every parameter and buffer, also those that no checkpoint has."""
    for kind in ("named_parameters", "named_buffers"):
        own, other = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert own.keys() == other.keys()
        for name, tensor in own.items():
            assert tensor.dtype == other[name].dtype, name
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_hubs_layout_loads_as_transformers_loads_it(hub: Path, dtype: str) -> None:
    names = json.loads((hub / "model.safetensors.index.json").read_text())["weight_map"]
    assert "backbone.layers.1.mixer.experts.4.up_proj.weight" in names
    assert len(set(names.values())) > 3
    theirs: Any = AutoModelForCausalLM.from_pretrained(hub, dtype=getattr(torch, dtype))
    assert_equal(load(hub, dtype), theirs)


OTHER: dict[str, Any] = {
    "vocab_size": 65, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_families_load_as_transformers_loads_them(tmp_path: Path, model_type: str, tied: bool) -> None:
    config = AutoConfig.for_model(model_type, **OTHER, tie_word_embeddings=tied)
    hub_folder(AutoModelForCausalLM.from_config(config), tmp_path / "hub")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.bfloat16)
    section = of_folder(tmp_path / "hub", "bfloat16")
    ours = empty_model(section, AutoConfig.from_pretrained(tmp_path / "hub"), NO_KERNELS, CPU)
    fill(ours, section, CPU, seed=1)
    assert_equal(ours, theirs)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


def test_what_is_larger_than_a_buffer_is_read_in_chunks(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(hub)
    monkeypatch.setattr(loading, "CHUNK_BYTES", 64)
    assert_equal(load(hub), whole)


def _on_one_of_two(rank: int, folder: str, port: int, config_file: str, gathering: str) -> None:
    """Builds both models sharded; what a process keeps of each goes into a file of its own."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    hub, tied = of_folder(Path(folder)), of_folder(Path(folder, "tied"))
    drawn = read_config(Path(config_file), ODD).model
    for name, section in (("loaded", hub), ("tied", tied), ("random", drawn)):
        model = empty_model(section, model_config(section), NO_KERNELS, CPU)
        if gathering == "fsdp2":
            shard_with_fsdp2(nn.Sequential(model), blocks_of(model), World(rank, 2, CPU))
        else:
            shared = share(blocks_of(model), World(rank, 2, CPU))
        with mock.patch.object(loading._Readers, "read", autospec=True, side_effect=READ) as read:
            fill(model, section, CPU, seed=3)
        asked = [part.into.nbytes for call in read.call_args_list for part in call.args[1]]
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == (name == "tied")
        kept = sum(loading.local_part(tensor)[0].nbytes for tensor in model.parameters())
        parts = {}
        for key, tensor in named_tensors(model).items():
            if isinstance(tensor, SharedParameter):
                shared.hold(tensor.block)
                tensor = tensor.detach().clone()
            parts[key] = tensor.full_tensor().contiguous() if isinstance(tensor, DTensor) else tensor
        save_file(parts, f"{folder}/of-{name}-{rank}")
        Path(f"{folder}/of-{name}-{rank}.json").write_text(json.dumps({"read": sum(asked), "kept": kept}))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads abort a process now and then whose interpreter shuts down under them


@pytest.mark.parametrize("gathering", ["in_place", "fsdp2"])
def test_two_processes_read_their_parts_and_together_have_the_whole(
    hub: Path, config_file: Path, gathering: str
) -> None:
    config = AutoConfig.for_model("llama", **OTHER, tie_word_embeddings=True)
    hub_folder(AutoModelForCausalLM.from_config(config), hub / "tied")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (str(hub), port, str(config_file), gathering)
    start_processes(_on_one_of_two, arguments, nprocs=2, start_method="spawn")
    drawn = read_config(config_file, ODD).model
    alone = {
        "loaded": load(hub),
        "tied": load(hub / "tied"),
        "random": build_model(drawn, model_config(drawn), NO_KERNELS, CPU, seed=3),
    }
    base = sum(parameter.nbytes for parameter in alone["loaded"].parameters())
    buffers = sum(buffer.nbytes for buffer in alone["loaded"].buffers())
    for name, model in alone.items():
        expected: dict[str, Tensor] = named_tensors(model)
        for rank in (0, 1):
            together = load_file(hub / f"of-{name}-{rank}")
            assert together.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[key]) for key, tensor in together.items())
    figures = [json.loads((hub / f"of-loaded-{rank}.json").read_text()) for rank in (0, 1)]
    # Each keeps its part of the blocks, and the rest whole.
    of_blocks = sum(p.nbytes for block in blocks_of(alone["loaded"]) for p in block.parameters())
    assert sum(figure["kept"] for figure in figures) == of_blocks + 2 * (base - of_blocks)
    assert all(figure["read"] == figure["kept"] + buffers for figure in figures)


def test_random_weights_depend_on_the_seed_alone(config_file: Path) -> None:
    section = read_config(config_file).model
    first, again, other = (
        build_model(section, model_config(section), NO_KERNELS, CPU, seed=seed) for seed in (3, 3, 4)
    )
    assert_equal(first, again)
    name = "model.layers.0.mixer.in_proj.weight"
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    # By the model's own rules: A from 1 to the number of heads.
    torch.testing.assert_close(first.model.layers[0].mixer.A_log.exp(), torch.arange(1.0, 5.0))


def rewrite(folder: Path, change: Any) -> dict[str, Tensor]:
    """Changes the tensors of a single-file model in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.fixture
def single(causal_lm: Any, tmp_path: Path) -> Path:
    return hub_folder(causal_lm, tmp_path / "single", shards=False)


EXPERT = "backbone.layers.1.mixer.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), r"lack lm_head\.weight"),
        (lambda t: t.pop(EXPERT), r"layers\.1\.mixer\.experts\.up_proj exactly once.* row 2"),
        (lambda t: t.update(extra=torch.zeros(2)), r"model\.safetensors: extra \[2\] is no tensor"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(3, 32)}),
            r"model\.safetensors: lm_head\.weight \[3, 32\] doesn't fit lm_head\.weight \[264, 32\]",
        ),
        (
            lambda t: t.update({EXPERT.replace(".2.", ".4."): t[EXPERT].clone()}),
            r"experts\.4\.up_proj\.weight \[32, 32\] doesn't fit",
        ),
        (
            lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)}),
            r"experts\.2\.up_proj\.weight \[32, 32\] is stored as I8",
        ),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(single: Path, change: Any, message: str) -> None:
    rewrite(single, change)
    with pytest.raises(ConfigError, match=message) as problem:
        load(single)
    assert str(single) in str(problem.value.context) + problem.value.remedy


def test_tensors_that_transformers_leaves_out_are_left_out(single: Path) -> None:
    before = load(single)
    rewrite(single, lambda t: t.update({"mtp.layers.0.weight": torch.zeros(2)}))
    assert_equal(load(single), before)


def test_a_file_that_was_cut_off_or_is_missing_is_named(hub: Path, tmp_path: Path) -> None:
    for number, damage in enumerate((lambda f: f.write_bytes(f.read_bytes()[:-7]), Path.unlink)):
        broken = tmp_path / str(number)
        shutil.copytree(hub, broken)
        victim = sorted(broken.glob("*.safetensors"))[1]
        damage(victim)  # type: ignore[operator]
        with pytest.raises(ConfigError, match=victim.name):
            load(broken)


def test_a_file_that_ends_while_it_is_read_is_an_error(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = loading.pieces_of

    def cut_then(causal_lm: Any, folder: Path) -> Any:
        found = pieces(causal_lm, folder)
        os.truncate(folder / "model.safetensors", 5000)
        return found

    section = of_folder(single)
    model = empty_model(section, model_config(section), NO_KERNELS, CPU)
    model.to_empty(device=CPU)
    monkeypatch.setattr(loading, "pieces_of", cut_then)
    with pytest.raises(ConfigError, match="ends too early"):
        load_weights(model, single)
