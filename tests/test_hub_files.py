"""Which files of a model's repository are taken, and which repositories are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from envbuilder.errors import InputError
from envbuilder.hub_files import Choice, ModelRepository, choose_files

SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}})
WHOLE = {"config.json": "{}", "model.safetensors": ""}
SHARDED = {"config.json": "{}", "model.safetensors.index.json": INDEX, **dict.fromkeys(SHARDS, "")}
CUSTOM = json.dumps({"auto_map": {"AutoConfig": "configuration_x.Config", "AutoModel": "modeling_x.Model"}})
CUSTOM_FILES = {**WHOLE, "config.json": CUSTOM, "configuration_x.py": "", "modeling_x.py": ""}


def choose(files: Mapping[str, str], remote_code: list[str] | None = None) -> Choice:
    repository = ModelRepository("tiny", "owner/tiny", files.keys(), lambda name: files[name].encode())
    return choose_files(repository, remote_code)


def refused(files: Mapping[str, str], remote_code: list[str] | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        choose(files, remote_code)
    assert caught.value.context["key"] == "model.tiny"
    return caught.value


def test_weights_configuration_tokenizer_templates_and_licence_are_taken() -> None:
    wanted = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "preprocessor_config.json",
        "merges.txt",
        "vocab.txt",
        "tokenizer.model",
        "qwen.tiktoken",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "README.md",
        "LICENSE",
        "LICENSE.md",
        "LICENSE-APACHE.txt",
        "NOTICE",
    ]
    assert choose({**SHARDED, **dict.fromkeys(wanted, "{}")}).files == tuple(sorted({*SHARDED, *wanted}))


@pytest.mark.parametrize(
    "name",
    [
        "training_args.bin",
        "LICENSE.bin",
        "optimizer.pt",
        "figure.png",
        "setup.py",
        ".gitattributes",
        ".hidden.json",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors.index.json",
        "original/params.json",
        "additional_chat_templates/x.py",
        # It would send from_pretrained to the base model's repository.
        "adapter_config.json",
        "../outside.json",
        "/etc/outside.json",
        "a\nb.json",
        "additional_chat_templates/../../x.jinja",
    ],
)
def test_nothing_else_is_taken(name: str) -> None:
    assert choose({**WHOLE, name: "{}"}).files == tuple(sorted(WHOLE))


@pytest.mark.parametrize(
    "extra",
    [
        ["original/consolidated.safetensors"],
        ["consolidated.safetensors"],
        ["consolidated-00001-of-00001.safetensors", "consolidated.safetensors.index.json"],
        ["pytorch_model.bin", "model.fp16.safetensors", "onnx/model.onnx", "model-q4.gguf"],
    ],
)
def test_weights_that_from_pretrained_does_not_read_are_left_out_and_told(extra: list[str]) -> None:
    choice = choose({**SHARDED, **dict.fromkeys(extra, "{}")})
    assert choice.files == tuple(sorted(SHARDED))
    assert choice.left_out == tuple(sorted(name for name in extra if not name.endswith(".json")))


def test_one_file_of_weights_goes_before_shards_as_in_transformers() -> None:
    choice = choose({**SHARDED, "model.safetensors": ""})
    assert choice.files == ("config.json", "model.safetensors")
    assert choice.left_out == tuple(SHARDS)


def test_the_config_may_name_the_weights() -> None:
    config = json.dumps({"transformers_weights": "other.safetensors"})
    choice = choose({**WHOLE, "config.json": config, "other.safetensors": ""})
    assert choice.files == ("config.json", "other.safetensors")


def test_pickled_weights_alone_are_refused() -> None:
    error = refused({"config.json": "{}", "pytorch_model.bin": "", "pytorch_model.bin.index.json": "{}"})
    assert "no safetensors" in error.message
    assert "run code" in error.message
    assert "revision" in error.remedy


@pytest.mark.parametrize("named", ["pytorch_model.bin", "../up.safetensors", "sub/x.safetensors"])
def test_a_config_that_names_other_weights_is_refused(named: str) -> None:
    config = json.dumps({"transformers_weights": named})
    assert named in refused({**WHOLE, "config.json": config, named: ""}).message


def test_safetensors_that_transformers_would_not_find_are_refused() -> None:
    error = refused({"config.json": "{}", "consolidated.safetensors": ""})
    assert "model.safetensors" in error.message


def test_a_repository_without_config_is_refused() -> None:
    assert "config.json" in refused({"model.safetensors": "", "params.json": "{}"}).message


def test_a_shard_that_is_missing_is_refused_by_its_name() -> None:
    files = {name: text for name, text in SHARDED.items() if name != SHARDS[1]}
    error = refused(files)
    assert "1 of the 2 shards" in error.message
    assert error.context["missing"] == SHARDS[1]


@pytest.mark.parametrize("shard", ["../model.safetensors", "model.bin", "/model.safetensors", ""])
def test_an_index_that_leads_elsewhere_is_refused(shard: str) -> None:
    index = json.dumps({"weight_map": {"a": shard}})
    files = {"config.json": "{}", "model.safetensors.index.json": index, shard: ""}
    assert "no safetensors file beside it" in refused(files).message


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_a_damaged_config_is_refused(text: str) -> None:
    assert "config.json" in refused({**WHOLE, "config.json": text}).message


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_shards_is_refused(weight_map: object) -> None:
    index = json.dumps({"weight_map": weight_map})
    error = refused({"config.json": "{}", "model.safetensors.index.json": index})
    assert "weight_map" in error.message


def test_code_that_the_recipe_says_nothing_of_is_refused_with_both_ways_out() -> None:
    files = {**CUSTOM_FILES, "modeling_x.py": "from .helpers_x import y\n", "helpers_x.py": ""}
    error = refused(files)
    assert "remote-code = []" in error.remedy
    assert 'remote-code = ["configuration_x.py", "helpers_x.py", "modeling_x.py"]' in error.remedy
    assert "modeling_x.py" in error.context["code"]


@pytest.mark.parametrize(
    ("file", "auto_map"),
    [
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_x.Slow", None]}),
        ("tokenizer_config.json", ["tokenization_x.Slow", None]),
        ("processor_config.json", {"AutoProcessor": "tokenization_x.Processor"}),
        ("config.json", {"AutoModel": "tokenization_x.Gone"}),
    ],
)
def test_code_is_seen_wherever_auto_map_stands(file: str, auto_map: object) -> None:
    error = refused({**WHOLE, file: json.dumps({"auto_map": auto_map})})
    assert error.context["code"] == "tokenization_x.py"


def test_an_empty_list_says_that_the_code_is_not_needed() -> None:
    assert choose(CUSTOM_FILES, []) == Choice(("config.json", "model.safetensors"), (), ())


def test_listed_code_is_taken() -> None:
    files = {
        **CUSTOM_FILES,
        "modeling_x.py": "import torch\nfrom .sub.deep import y\nz = '\\d'\n",
        "sub/deep.py": "",
    }
    listed = ["modeling_x.py", "configuration_x.py", "sub/deep.py"]
    choice = choose(files, listed)
    assert choice.remote_code == ("configuration_x.py", "modeling_x.py", "sub/deep.py")
    assert choice.files == tuple(sorted([*WHOLE, *listed]))


@pytest.mark.parametrize("listed", ["gone.py", "config.json", "../x.py", "/x.py"])
def test_a_listed_file_that_is_no_python_file_of_the_repository_is_refused(listed: str) -> None:
    files = {**CUSTOM_FILES, "../x.py": "", "/x.py": ""}
    assert repr(listed) in refused(files, [*(name for name in CUSTOM_FILES if ".py" in name), listed]).message


@pytest.mark.parametrize(
    "source",
    [
        "from .helpers import x",
        "from . import helpers",
        "def f():\n    from .helpers import x",
        "try:\n    from .helpers import x\nexcept ImportError: pass",
    ],
)
def test_listed_code_that_imports_unlisted_code_is_refused(source: str) -> None:
    files = {**CUSTOM_FILES, "modeling_x.py": source, "helpers.py": "from .more import y", "more.py": ""}
    error = refused(files, ["configuration_x.py", "modeling_x.py"])
    assert error.context["missing"] == "helpers.py, more.py"
    assert 'remote-code = ["configuration_x.py", "helpers.py", "modeling_x.py", "more.py"]' in error.remedy


def test_a_package_is_found_as_one() -> None:
    files = {**CUSTOM_FILES, "modeling_x.py": "from .layers import y", "layers/__init__.py": ""}
    error = refused(files, ["configuration_x.py", "modeling_x.py"])
    assert error.context["missing"] == "layers/__init__.py"


def test_code_that_auto_map_names_and_the_recipe_leaves_out_is_refused() -> None:
    error = refused(CUSTOM_FILES, ["modeling_x.py"])
    assert error.context["missing"] == "configuration_x.py"


def test_code_that_imports_what_the_repository_lacks_is_refused() -> None:
    files = {**CUSTOM_FILES, "modeling_x.py": "from .gone import x"}
    error = refused(files, ["configuration_x.py", "modeling_x.py"])
    assert error.context["missing"] == "gone.py"
    assert "doesn't have" in error.message


@pytest.mark.parametrize("source", ["print 'x'", "x = \0", "(" * 10_000])
def test_code_that_cannot_be_parsed_is_refused(source: str) -> None:
    assert "parsed" in refused({**CUSTOM_FILES, "modeling_x.py": source}, ["modeling_x.py"]).message


def test_code_of_another_repository_is_refused_unless_it_is_not_needed() -> None:
    config = json.dumps({"auto_map": {"AutoModel": "other/code--modeling_x.Model"}})
    files = {**WHOLE, "config.json": config, "modeling_x.py": ""}
    assert "other/code (another repository)" in refused(files).context["code"]
    assert refused(files, ["modeling_x.py"]).context["code"] == "other/code"
    assert choose(files, []).remote_code == ()
