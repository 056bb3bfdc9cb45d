"""The CUDA of the locked torch against a probed machine: its driver's version, and its GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.cuda_support import CUDA_MAJORS, driver_runs, has_code_for, newest_cuda
from envbuilder.errors import MismatchError
from envbuilder.lock import read_lock
from envbuilder.machine import MachineRecord, ProbedGpu, TorchBuild
from envbuilder.recipe import Recipe, load_recipe
from envbuilder.resolve.gpus import check_capabilities, check_cuda, cuda_of
from envbuilder.resolve.kept import Resolution
from tests.conftest import REPOSITORY
from tests.machines import machine_record

RECIPE = Recipe.model_validate({"name": "demo", "requirements": ["torch"]})
CUDA_13 = {"torch": "2.11.0", "nvidia-cuda-runtime": "13.0.96"}
CUDA_12 = {"torch": "2.10.0", "nvidia-cuda-runtime-cu12": "12.8.90"}


def runtime(versions: dict[str, str]) -> Resolution:
    return {"runtime": {"3.12": versions}}


def node(
    *, driver: str | None = None, served: str | None = None, capability: str | None = None, **fields: object
) -> MachineRecord:
    gpus = (ProbedGpu(name="Tesla", compute_capability=capability, memory_bytes=None),) if capability else ()
    return machine_record().model_copy(
        update={"driver": driver, "driver_cuda": served, "gpus": gpus} | fields
    )


@pytest.mark.parametrize(
    ("versions", "cuda"),
    [
        (CUDA_12, "12.8"),
        (CUDA_13, "13.0"),
        ({"torch": "2.9.0+cu126", "nvidia-cuda-runtime-cu12": "12.8.90"}, "12.6"),
        ({"torch": "2.10.0+cpu"}, None),
        ({"nvidia-cuda-runtime": "13.0.96"}, None),
    ],
)
def test_torch_s_cuda_is_that_of_its_runtime(versions: dict[str, str], cuda: str | None) -> None:
    assert cuda_of(versions) == cuda


@pytest.mark.parametrize(
    "machine",
    [
        node(driver="580.65.06"),
        node(driver="590.48.01", served="13.1", capability="7.5"),
        node(driver="535.54.03", served="13.0"),  # forward compatibility: what it serves is what counts
        node(driver="[N/A]"),
        node(),
        node(capability="12.0"),
    ],
    ids=lambda machine: f"{machine.driver} {machine.driver_cuda}",
)
def test_what_the_machine_can_run_or_does_not_tell_is_locked(machine: MachineRecord) -> None:
    check_cuda(RECIPE, runtime(CUDA_13), machine)


@pytest.mark.parametrize(
    ("versions", "machine", "told", "remedy"),
    [
        (
            CUDA_13,
            node(driver="580.65.05"),
            r"CUDA 13\.0, which needs driver 580\.65\.06 or newer; the probed machine's is 580\.65\.05",
            '"torch>=2.1,<2.11"',
        ),
        (
            CUDA_13,
            node(driver="535.54.03", served="12.2"),
            r"the probed machine's is 535\.54\.03 and serves CUDA 12\.2",
            "recipes/nemotron3-nano-leonardo-train.toml",
        ),
        (CUDA_12, node(driver="470.256.02"), r"needs driver 525\.60\.13", '"torch>=1.13,<2.1"'),
        (CUDA_12, node(driver="390.157"), r"is 390\.157\.", "sinfo -o '%f'"),
        (
            CUDA_13,
            node(driver="580.65.06", capability="7.0"),
            r"has no code for the probed machine's Tesla \(compute capability 7\.0\)",
            '"torch>=2.1,<2.11"',
        ),
    ],
)
def test_what_the_machine_cannot_run_is_refused_with_what_to_take(
    versions: dict[str, str], machine: MachineRecord, told: str, remedy: str
) -> None:
    with pytest.raises(MismatchError, match=told) as caught:
        check_cuda(RECIPE, runtime(versions), machine)
    assert remedy in caught.value.remedy


def test_the_machine_s_own_torch_is_held_against_its_driver() -> None:
    torch = TorchBuild(version="2.11.0+cu130", cuda="13.0", cxx11_abi=True)
    with pytest.raises(MismatchError, match=r"torch 2\.11\.0\+cu130 is built with CUDA 13\.0") as caught:
        check_cuda(RECIPE, runtime({}), node(driver="535.54.03", torch=torch))
    assert "envbuilder probe --recipe recipes/demo.toml" in caught.value.remedy


def test_on_arm_an_index_is_named_for_pypi_has_no_older_cuda_there() -> None:
    arm = RECIPE.model_copy(update={"target": RECIPE.target.model_copy(update={"machine": "aarch64"})})
    with pytest.raises(MismatchError) as caught:
        check_cuda(arm, runtime(CUDA_13), node(driver="535.54.03"))
    assert 'torch = "NAME" in [index]' in caught.value.remedy


def test_an_unknown_major_version_is_judged_by_what_the_driver_says_alone() -> None:
    assert driver_runs("99.0", driver="580.65.06", served=None) is None
    assert driver_runs("99.0", driver="580.65.06", served="13.0") is False
    assert has_code_for("99.0", "3.5")
    assert newest_cuda(driver=None, served=None) == max(CUDA_MAJORS)


def compiling(capabilities: list[str], *, gpu: bool = True, **cuda: object) -> Recipe:
    """A recipe that compiles a package for these GPUs."""
    keys = {"compute-capabilities": capabilities, "toolchain": "system", **cuda}
    return Recipe.model_validate(
        {"name": "demo", "requirements": ["native"], "cuda": keys, "build": {"native": {"gpu": gpu}}}
    )


@pytest.mark.parametrize(
    ("recipe", "capability"),
    [
        (compiling(["9.0"]), "9.0"),
        (compiling(["9.0a"]), "9.0"),
        (compiling(["8.0", "9.0"]), "8.0"),
        (compiling(["8.0"]), "8.6"),  # machine code runs on later GPUs of the same major version
        (compiling(["8.0"], ptx=True), "9.0"),  # and PTX on all later ones
        (compiling(["8.0"], detect=True), "9.0"),
        (compiling(["8.0"], gpu=False), "9.0"),
        (compiling(["8.0"]), None),
        (RECIPE, "7.5"),
    ],
)
def test_a_recipe_whose_code_the_machine_s_gpus_run_is_locked(recipe: Recipe, capability: str | None) -> None:
    check_capabilities(recipe, node(capability=capability))


@pytest.mark.parametrize(
    ("recipe", "capability"),
    [
        (compiling(["8.0"]), "9.0"),
        (compiling(["9.0"]), "8.0"),
        (compiling(["8.6"]), "8.0"),
        (compiling(["9.0"], ptx=True), "8.0"),
        (compiling(["9.0a"]), "10.0"),
        (compiling(["7.5", "9.0"]), "8.0"),
    ],
)
def test_a_recipe_that_compiles_nothing_for_the_machine_s_gpus_is_refused_with_what_to_write(
    recipe: Recipe, capability: str
) -> None:
    told = rf"none of that code runs on the probed machine's Tesla \(compute capability {capability}\)"
    with pytest.raises(MismatchError, match=told) as caught:
        check_capabilities(recipe, node(capability=capability))
    assert f'compute-capabilities = ["{capability}"] under [cuda] of recipes/demo.toml' in caught.value.remedy


def test_every_gpu_of_a_mixed_machine_has_to_be_served() -> None:
    gpus = tuple(
        ProbedGpu(name=name, compute_capability=capability, memory_bytes=None)
        for name, capability in (("H200", "9.0"), ("A100", "8.0"), ("unknown", None))
    )
    machine = machine_record().model_copy(update={"gpus": gpus})
    with pytest.raises(MismatchError, match=r"machine's A100 \(compute capability 8\.0\)") as caught:
        check_capabilities(compiling(["9.0"]), machine)
    assert 'compute-capabilities = ["8.0", "9.0"]' in caught.value.remedy
    check_capabilities(compiling(["8.0", "9.0"]), machine)


@pytest.mark.parametrize("major", CUDA_MAJORS)
def test_the_recipes_that_are_named_hold_a_torch_of_that_cuda(major: int) -> None:
    if name := CUDA_MAJORS[major].recipe:
        assert load_recipe(REPOSITORY / f"recipes/{name}.toml").name == name
        lock = read_lock(Path(REPOSITORY / f"lockfiles/pylock.{name}.toml"))
        versions = {package.name: str(package.version) for package in lock.pylock.packages}
        assert (cuda_of(versions) or "").startswith(f"{major}.")
