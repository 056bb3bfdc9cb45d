"""Site files: what they may say, and how a mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.errors import InputError
from envbuilder.site import load_site

REPOSITORY = Path(__file__).parent.parent
SECTION = 'partition = "gpu"\nwalltime = "01:00:00"\ncpus = 8\nmemory = "64G"\n'
SITE = f'name = "mine"\n[build]\n{SECTION}[train]\n{SECTION}'


def refusal(path: Path, text: str) -> InputError:
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_site(str(path))
    return caught.value


SHIPPED = sorted(path.stem for path in (REPOSITORY / "recipes/sites").glob("*.toml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_sites_that_are_shipped_are_found_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert load_site(name).name == name


def test_a_site_is_found_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(SITE)
    site = load_site(str(tmp_path / "mine.toml"))
    assert site.build.partition == "gpu"
    assert (site.build.account, site.build.gpus, site.modules, site.env) == (None, 0, (), {})


def test_an_unknown_site_is_refused_with_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(InputError, match=r"no site at recipes/sites/atlantis\.toml") as caught:
        load_site("atlantis")
    assert "recipes/sites/leonardo.toml" in caught.value.remedy


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('name = "mine"', 'name = "mine"\nmodule = ["gcc"]', "module"),
        ("cpus = 8", 'cpus = "8"\nqueue = "x"', "build.queue"),
        ("cpus = 8", "cpus = 0", "build.cpus"),
        ("cpus = 8", "cpus = 8\nnodes = 0", "build.nodes"),
        ("cpus = 8", 'cpus = 8\ngpu-memory = "much"', "build.gpu-memory"),
        ('walltime = "01:00:00"', 'walltime = "one hour"', "build.walltime"),
        ('memory = "64G"', 'memory = "lots"', "build.memory"),
        ('partition = "gpu"', 'partition = "gpu\\n#SBATCH --wckey=x"', "build.partition"),
        ('partition = "gpu"', 'partition = "--test-only"', "build.partition"),
        ("cpus = 8", "cpus = 8\ngpus = 1", "build"),
        ("cpus = 8", 'cpus = 8\ngpu-request = "gres"', "build"),
        ("cpus = 8", 'cpus = 8\ngpus = 1\ngpu-request = "typed-gres"', "build"),
        ("cpus = 8", 'cpus = 8\ngpus = 1\ngpu-request = "gres"\ngpu-type = "a100"', "build"),
        ("cpus = 8", 'cpus = 8\ngpus = 1\ngpu-request = "please"', "build.gpu-request"),
        ("cpus = 8", 'cpus = 8\nconstraint = "gpu --wckey=x"', "build.constraint"),
        ("cpus = 8", 'cpus = 8\nreservation = "two words"', "build.reservation"),
        ("cpus = 8", 'cpus = 8\nexclusive = "user"', "build.exclusive"),
        ("cpus = 8", 'cpus = 8\nextra-sbatch = "--hint=nomultithread"', "build.extra-sbatch"),
        ("cpus = 8", 'cpus = 8\nextra-sbatch = ["-C gpu"]', "build.extra-sbatch[0]"),
        ("cpus = 8", 'cpus = 8\nextra-sbatch = ["--hint nomultithread"]', "build.extra-sbatch[0]"),
        ("cpus = 8", 'cpus = 8\nextra-sbatch = ["--comment=x\\n#SBATCH"]', "build.extra-sbatch[0]"),
        ("cpus = 8", 'cpus = 8\nextra-sbatch = ["#SBATCH --hint=x"]', "build.extra-sbatch[0]"),
        ("cpus = 8\n", "", "build"),
        ("cpus = 8", "cpus = 8\ncpus-per-gpu = 8", "build"),
        ("cpus = 8", "cpus-per-gpu = 8", "build"),
        ('name = "mine"', 'name = "mine"\nproxy = "proxy:3128"', "proxy"),
        ('name = "mine"', 'name = "mine"\nproxy = "http://me:secret@proxy:3128"', "proxy"),
        ('name = "mine"', 'name = "mine"\nno-proxy = [".local"]', "site"),
        ('name = "mine"', 'name = "mine"\nsocket-ifname = "ib0; id"', "socket-ifname"),
        ('name = "mine"', 'name = "mine"\nnode-suffix = "$(id)"', "node-suffix"),
        ('name = "mine"', 'name = "mine"\nmodules = ["gcc; rm -rf /"]', "modules[0]"),
        ('name = "mine"', 'name = "mine"\nsetup = ["a\\nb"]', "setup[0]"),
        ('name = "mine"', 'name = "mine"\nenv = {"A B" = "1"}', "env.A B.[key]"),
    ],
)
def test_a_mistake_is_told_with_its_key(tmp_path: Path, old: str, new: str, key: str) -> None:
    error = refusal(tmp_path / "mine.toml", SITE.replace(old, new, 1))
    assert key in error.context["keys"].split(", ")
    assert error.context["file"] == str(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    "option",
    ["--mem=8G", "--time=1", "--parti=x", "--job-name=x", "--sig=TERM", "--no-requeue", "--exclusive"],
)
def test_an_extra_option_does_not_undo_what_is_asked_for_already(tmp_path: Path, option: str) -> None:
    error = refusal(
        tmp_path / "mine.toml", SITE.replace("cpus = 8", f'cpus = 8\nextra-sbatch = ["{option}"]', 1)
    )
    assert f"extra-sbatch holds {option}, and envbuilder sets --" in error.message


@pytest.mark.parametrize(
    "option", ["--mem-per-cpu=2G", "--hint=nomultithread", "--nodelist=n1,n2", "--contiguous"]
)
def test_an_extra_option_goes_along_as_it_is(tmp_path: Path, option: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SITE.replace("cpus = 8", f'cpus = 8\nextra-sbatch = ["{option}"]', 1))
    site = load_site(str(path))
    assert site.build.sbatch_words[-1] == option
    assert option not in site.train.sbatch_words


def test_what_the_cluster_chooses_is_not_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    bare = SITE.replace('partition = "gpu"\n', 'constraint = "gpu&hbm80g"\n').replace('memory = "64G"\n', "")
    path.write_text(bare)
    options = load_site(str(path)).train.sbatch_options
    assert options["constraint"] == "gpu&hbm80g"
    assert not {"partition", "mem"} & set(options)


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    assert "is not TOML" in refusal(tmp_path / "mine.toml", "name = ").message


def test_a_build_takes_one_node_and_training_several(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    refused = refusal(path, SITE.replace("cpus = 8", "cpus = 8\nnodes = 2", 1))
    assert "a build runs on one node" in refused.message + str(refused.context)
    build, train = SITE.split("[train]")
    path.write_text(f"{build}[train]{train}".replace('name = "mine"', 'name = "mine"\nallow-chain = true'))
    path.write_text(path.read_text() + 'nodes = 2\ngpu-memory = "61G"\n')
    site = load_site(str(path))
    assert site.allow_chain
    options = site.train.sbatch_options
    assert (options["nodes"], options["ntasks"], options["ntasks-per-node"]) == ("2", "2", "1")
    assert "ntasks-per-node" not in site.build.sbatch_options
    assert site.train.gpu_memory_bytes == 61 * 2**30


def test_cpus_for_each_gpu_are_as_many_as_all_gpus_have(tmp_path: Path) -> None:
    asked = 'cpus-per-gpu = 8\ngpus = 4\ngpu-request = "gres"'
    (tmp_path / "mine.toml").write_text(SITE.replace("cpus = 8", asked, 1))
    spec = load_site(str(tmp_path / "mine.toml")).build
    assert spec.cpus == 32
    assert "--cpus-per-task=32" in spec.sbatch_words
    assert not [word for word in spec.sbatch_words if "cpus-per-gpu" in word]


def test_a_proxy_is_set_in_both_spellings_and_never_for_this_machine(tmp_path: Path) -> None:
    proxy = 'proxy = "http://proxy.site:3128"\nno-proxy = [".site"]\n'
    (tmp_path / "mine.toml").write_text(proxy + SITE)
    variables = load_site(str(tmp_path / "mine.toml")).variables
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        assert variables[name] == "http://proxy.site:3128"
    assert variables["NO_PROXY"] == variables["no_proxy"] == "localhost,127.0.0.1,::1,.site"
    (tmp_path / "mine.toml").write_text(SITE)
    assert load_site(str(tmp_path / "mine.toml")).variables == {}


def test_a_template_lies_beside_its_site(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f'template = "job.sh"\n{SITE}')
    assert load_site(str(tmp_path / "mine.toml")).template == str(tmp_path / "job.sh")
