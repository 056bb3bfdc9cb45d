"""The report for the help desk: one file, well-formed, and without what is private."""

from __future__ import annotations

import re
import stat
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from envbuilder.doctor import Subject
from envbuilder.doctor.facts import EnvFacts, Facts, GpuFacts, MachineFacts, SubjectFacts, find_facts
from envbuilder.doctor.page import Report, fact_rows, render, write_report
from envbuilder.errors import MismatchError
from envbuilder.model import Finding
from envbuilder.paths import Root
from envbuilder.site import JobSpec, Site

HOSTILE = "<script>alert('x')</script> & \"quotes\" </pre> \x00\x1b[31mred\x1b[0m \ud800"
XHTML = "{http://www.w3.org/1999/xhtml}"
FAILED = Finding(
    check="env.lock",
    verdict="failed",
    summary="The env is of another lock.",
    evidence=("expected: aaa", "got: bbb"),
    remedy="envbuilder install recipes/x.toml --reinstall",
)
WARNING = Finding(
    check="storage.speed", verdict="warning", summary="The disk is slow.", remedy="Use another."
)
OK = Finding(check="platform.glibc", verdict="ok", summary="glibc 2.36 will do.", evidence=("found: 2.36",))
SKIPPED = Finding(check="gpu.driver", verdict="skipped", summary="This machine has no GPU.")


def page_of(*findings: Finding, command: str = "envbuilder doctor") -> ElementTree.Element:
    """The page, parsed."""
    page = render(Report("title", "0.1.0", "2026-01-01", command, (("CPUs", "2"),), findings))
    return ElementTree.fromstring(page.partition("\n")[2])


def words(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def written(tmp_path: Path, *findings: Finding, site: Site | None = None) -> str:
    subject = Subject(None, Root(tmp_path / "root"), None, site=site)
    write_report(tmp_path / "out/report.html", findings, find_facts(subject), subject)
    return (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_what_failed_comes_first_with_evidence_and_remedy() -> None:
    page = page_of(WARNING, OK, FAILED, SKIPPED)
    cards = page.findall(f".//{XHTML}article")
    assert [card.get("id") for card in cards] == ["env.lock", "storage.speed"]
    for part in (FAILED.summary, *FAILED.evidence, FAILED.remedy):
        assert part in words(cards[0])
    rows = [words(row) for row in page.iter(f"{XHTML}div") if (row.get("class") or "").startswith("row")]
    assert len(rows) == 4
    assert any(OK.evidence[0] in row for row in rows)
    assert any(SKIPPED.summary in row for row in rows)


def test_the_page_needs_nothing_else() -> None:
    page = page_of(FAILED, OK)
    assert not [
        element.tag for element in page.iter() if element.tag.removeprefix(XHTML) in ("script", "img", "link")
    ]
    links = [value for element in page.iter() for name, value in element.items() if name in ("href", "src")]
    assert links == ["#env.lock"]
    style = "".join(element.text or "" for element in page.iter(f"{XHTML}style"))
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    assert "url(" not in style
    assert "@import" not in style


def test_whatever_a_finding_holds_is_shown_and_never_run(tmp_path: Path) -> None:
    hostile = Finding(check="log.x", verdict="failed", summary=HOSTILE, evidence=(HOSTILE,), remedy=HOSTILE)
    page = written(tmp_path, hostile)
    tree = ElementTree.fromstring(page.partition("\n")[2])
    assert not list(tree.iter(f"{XHTML}script"))
    card = words(next(tree.iter(f"{XHTML}article")))
    assert card.count("<script>alert('x')</script> & \"quotes\" </pre> \ufffdred \ufffd") == 3
    assert "\x1b" not in page


@pytest.mark.parametrize(
    ("findings", "title"),
    [
        ((FAILED, WARNING, OK), "1 check failed"),
        ((FAILED, FAILED), "2 checks failed"),
        ((WARNING, OK), "Nothing failed, with warnings"),
        ((OK, SKIPPED), "All is well"),
        ((SKIPPED,), "Nothing was checked"),
    ],
)
def test_the_title_says_how_it_stands(tmp_path: Path, findings: tuple[Finding, ...], title: str) -> None:
    assert f"<h1>{title}</h1>" in written(tmp_path, *findings)


def test_a_planted_secret_is_nowhere_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {
        "HF_TOKEN": "hf_PlantedPlantedPlanted",
        "MY_PASSWORD": "mellon",
        "PIP_INDEX_URL": "https://frodo:precious1@mirror.example/simple",
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("USER", "fbaggins")
    monkeypatch.setenv("HOME", "/cluster/shire/fbaggins")
    monkeypatch.setenv("SLURMD_NODENAME", "bagend01")
    monkeypatch.setattr(
        sys, "argv", ["envbuilder", "doctor", "--log", "/home/fbaggins/a.log", "--token", "commandline1"]
    )
    key = "-----BEGIN PRIVATE KEY-----", "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC", "-----END PRIVATE KEY-----"
    job = JobSpec(partition="gpu", walltime="01:00:00", cpus=1, memory="1G", account="SHIRE_01")
    page = written(
        tmp_path,
        Finding(
            check="log.x",
            verdict="failed",
            summary="bagend01 (10.1.2.3) refused fbaggins: mellon.",
            evidence=(
                "line 7: WANDB_API_KEY=" + "ab" * 20,
                "line 8: password hunter22",
                "again hunter22 and precious1",
                "export OTHER_SECRET='a b c d'; echo a b c d",
                "hf_PlantedPlantedPlanted of sam@shire.example in /home/sam/x; sam",
                *key,
            ),
            remedy="sbatch --account=SHIRE_01 for fbaggins with mellon",
        ),
        Finding(check="env.x", verdict="ok", summary="Of fbaggins.", evidence=("mellon commandline1",)),
        site=Site(name="shire", build=job, train=job),
    )
    for private in (
        *planted.values(),
        "precious1",
        "commandline1",
        "abababab",
        "hunter22",
        "a b c d",
        "MIIEvQ",
        "fbaggins",
        "bagend01",
        "10.1.2.3",
        "shire.example",
        "SHIRE_01",
    ):
        assert private not in page, private
    assert not re.search(r"\bsam\b", page)
    assert "/home/&lt;user&gt;/a.log" in page


def test_the_facts_of_a_machine_and_its_env_are_shown() -> None:
    machine = MachineFacts(
        hostname="n",
        os="Debian 12",
        kernel="6.1",
        architecture="x86_64",
        python="3.11.2",
        cpus=16,
        cpu_limit=8.0,
        memory_bytes=64 << 30,
        memory_limit_bytes=32 << 30,
        gpus=(GpuFacts("NVIDIA H200", "143771", "580.65.06"),),
        slurm_job="4711",
    )
    env = EnvFacts("/r/envs/x", "3.12.4", 63, ("causal_conv1d_cuda",), ("9.0",), "b" * 64, "2026-01-01")
    rows = dict(fact_rows(Facts("0.1.0", machine, SubjectFacts("x", "/r", "a" * 64, env))))
    assert rows["CPUs"] == "16; the control group allows the time of 8"
    assert rows["Memory"] == "64 GiB; the control group allows 32 GiB"
    assert rows["GPUs"] == "NVIDIA H200, 143771 MiB, driver 580.65.06"
    assert rows["Slurm job"] == "4711"
    assert rows["Lock"].endswith("a" * 64)
    assert rows["Compiled"] == "causal_conv1d_cuda, for 9.0"


def test_the_report_is_the_users_and_its_groups(tmp_path: Path) -> None:
    written(tmp_path, OK)
    assert stat.S_IMODE((tmp_path / "out/report.html").stat().st_mode) == 0o640
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_a_place_that_cant_be_written_is_named(tmp_path: Path) -> None:
    subject = Subject(None, Root(tmp_path), None)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(MismatchError, match="can't be written"):
        write_report(tmp_path / "file/report.html", (OK,), find_facts(subject), subject)
