from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from envbuilder.compile.units.records import Estimate, Records, UnitId, weight_of

GB = 1_000_000_000
UNIT = UnitId("fused", "csrc/kernel.cu", "", ("sm_90",), "nvcc 13.0")
HOST = UnitId("fused", "csrc/bind.cpp", "", (), "g++ 12")


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_a_unit_takes_what_it_took_last_time_in_another_process_too(tmp_path: Path) -> None:
    first, second = Records.open(tmp_path / "records"), Records.open(tmp_path / "records")
    first.add(UNIT, seconds=50.0, cpu_seconds=40.0, memory=GB)
    second.add(HOST, seconds=30.0, cpu_seconds=0, memory=2 * GB)
    assert len(files(tmp_path / "records")) == 2  # no two writers share a file
    read = Records.open(tmp_path / "records")
    assert read.estimate(UNIT, 100) == Estimate(40.0, int(1.1 * GB), known=True)
    assert read.estimate(HOST, 100) == Estimate(30.0, int(2.2 * GB), known=True)
    assert first.estimate(UNIT, 100).seconds == 40.0  # the process that added it knows it already


def test_nothing_is_written_until_something_is_recorded(tmp_path: Path) -> None:
    Records.open(tmp_path / "records").estimate(UNIT, 100)
    assert not (tmp_path / "records").exists()


def test_the_last_few_count_their_median_time_and_their_most_memory(tmp_path: Path) -> None:
    records = Records.open(tmp_path)
    for seconds, memory in ((9000, 9 * GB), (10, GB), (11, GB), (900, 3 * GB), (12, GB), (13, GB)):
        records.add(UNIT, seconds, seconds, memory)
    assert records.estimate(UNIT, 0) == Estimate(12.0, int(3.3 * GB), known=True)
    assert Records.open(tmp_path).estimate(UNIT, 0) == records.estimate(UNIT, 0)


def test_what_ran_on_several_cpus_is_brought_back_to_one(tmp_path: Path) -> None:
    records = Records.open(tmp_path)
    records.add(UNIT, seconds=100.0, cpu_seconds=150.0, memory=18 * GB // 10, threads=4)
    assert records.estimate(UNIT, 0).seconds == pytest.approx(100.0)
    assert records.estimate(UNIT, 0).memory == pytest.approx(1.1 * GB)


@pytest.mark.parametrize(
    ("recorded", "asked", "seconds"),
    [
        pytest.param(("sm_90",), ("sm_90", "sm_80", "sm_100"), 120.0, id="more architectures"),
        pytest.param(("sm_90", "sm_80"), ("sm_75",), 20.0, id="fewer"),
        pytest.param((), (), 40.0, id="a host file"),
    ],
)
def test_other_architectures_scale_the_time(
    tmp_path: Path, recorded: tuple[str, ...], asked: tuple[str, ...], seconds: float
) -> None:
    records = Records.open(tmp_path)
    records.add(UnitId("fused", "a.cu", "", recorded, "nvcc 12.8"), 40.0, 40.0, GB)
    estimate = records.estimate(UnitId("fused", "a.cu", "", asked, "nvcc 13.0"), 0)
    assert estimate == Estimate(seconds, int(1.1 * GB), known=True)


def test_the_same_compiler_tells_more_than_the_same_architectures(tmp_path: Path) -> None:
    records = Records.open(tmp_path)
    records.add(UnitId("fused", "a.cu", "", ("sm_80",), "nvcc 13.0"), 40.0, 40.0, GB)
    records.add(UnitId("fused", "a.cu", "", ("sm_90",), "nvcc 12.8"), 70.0, 70.0, GB)
    assert records.estimate(UnitId("fused", "a.cu", "", ("sm_90",), "nvcc 13.0"), 0).seconds == 40.0


def test_a_shard_is_its_share_of_the_whole_and_a_fifth_more(tmp_path: Path) -> None:
    records = Records.open(tmp_path)
    shard = UnitId("fused", "csrc/kernel.cu", "template void f<float>(int)", ("sm_90",), "nvcc 13.0")
    records.add(UNIT, 100.0, 100.0, 4 * GB)
    estimate = records.estimate(shard, 0, share=0.1)
    assert estimate.seconds == pytest.approx(12.0)
    assert 0.4 * GB < estimate.memory < GB
    assert estimate.known
    assert records.estimate(shard, 0, share=1.0).seconds == 100.0  # never more than the whole
    records.add(shard, 20.0, 20.0, GB)
    assert records.estimate(shard, 0, share=0.1).seconds == 20.0  # its own record comes first
    assert records.estimate(UNIT, 0).seconds == 100.0


def test_known_units_are_in_a_table() -> None:
    records = Records(Path("nowhere"))

    def estimate(package: str, source: str, *architectures: str, shard: str = "") -> Estimate:
        return records.estimate(UnitId(package, source, shard, architectures, "nvcc 13.0"), 0, share=1 / 18)

    backward = "csrc/causal_conv1d_bwd.cu"
    assert estimate("causal-conv1d", backward, "sm_90") == Estimate(360, 3_630_000_000, known=True)
    assert estimate("causal-conv1d", backward, "sm_90", "sm_80").seconds == 720
    assert estimate("causal-conv1d", backward, "sm_90", shard="x").seconds == pytest.approx(24.0)
    assert 0.48 * GB < estimate("causal-conv1d", backward, "sm_90", shard="x").memory < 0.8 * GB
    folder = "csrc/selective_scan/"
    assert estimate("mamba-ssm", f"{folder}selective_scan_bwd_bf16_complex.cu", "sm_90").seconds == 133
    assert estimate("mamba-ssm", f"{folder}selective_scan_bwd_bf16_real.cu", "sm_90").seconds == 103
    assert estimate("mamba-ssm", f"{folder}selective_scan_fwd_fp32.cu", "sm_90").seconds == 65
    assert estimate("mamba-ssm", f"{folder}selective_scan.cpp").memory == pytest.approx(1.65 * GB)
    kernels = "csrc/flash_attn/src/"
    assert estimate("flash-attn", f"{kernels}flash_fwd_split_hdim128_bf16_sm80.cu", "sm_90").seconds == 264
    assert estimate("flash-attn", f"{kernels}flash_fwd_hdim64_fp16_causal_sm80.cu", "sm_90").seconds == 190
    assert estimate("flash-attn", f"{kernels}flash_bwd_hdim96_bf16_sm80.cu", "sm_90").memory > 6 * GB
    assert not estimate("other", backward, "sm_90").known


def test_the_table_knows_which_instantiations_of_a_unit_are_the_long_ones() -> None:
    unit = UnitId("causal-conv1d", "csrc/causal_conv1d_bwd.cu")
    heavy = weight_of(unit, "template void causal_conv1d_channellast_bwd_cuda < float , float > ( ) ;")
    assert heavy > weight_of(unit, "template void causal_conv1d_bwd_cuda < float , float > ( ) ;") == 1
    assert weight_of(UnitId("causal-conv1d", "csrc/other.cu"), "template void channellast ( ) ;") == 1


def test_a_record_of_this_machine_comes_before_the_table(tmp_path: Path) -> None:
    unit = UnitId("causal-conv1d", "csrc/causal_conv1d_bwd.cu", "", ("sm_90",), "nvcc 13.0")
    records = Records.open(tmp_path)
    records.add(unit, 700.0, 700.0, 4 * GB)
    assert records.estimate(unit, 0).seconds == 700.0


def test_what_nobody_knows_is_guessed_by_its_language() -> None:
    records = Records(Path("nowhere"))
    assert records.estimate(UNIT, 0) == Estimate(60.0, 2 << 30, known=False)
    assert records.estimate(HOST, 0) == Estimate(40.0, 2 << 30, known=False)
    assert records.estimate(UnitId("fused", "a.cu", "", ("sm_80", "sm_90")), 0).seconds == 120.0
    assert 60.0 < records.estimate(UNIT, 30_000).seconds < records.estimate(UNIT, 10**9).seconds == 120.0


def test_total_is_the_work_of_all_and_the_memory_of_the_largest(tmp_path: Path) -> None:
    records = Records.open(tmp_path)
    records.add(UNIT, 100.0, 100.0, 4 * GB)
    assert records.total([(UNIT, 0), (UNIT, 0)]) == Estimate(200.0, int(4.4 * GB), known=True)
    assert records.total([(UNIT, 0), (HOST, 0)]) == Estimate(140.0, int(4.4 * GB), known=False)
    assert records.total([]) == Estimate(0, 0, known=True)


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    records = Records.open(tmp_path)
    records.add(UNIT, 100.0, 100.0, GB)
    (path,) = files(tmp_path)
    good = json.loads(path.read_text(encoding="utf-8"))
    damaged = [
        good | {"seconds": -1},
        good | {"seconds": 0},
        good | {"seconds": "long"},
        good | {"seconds": True},
        good | {"seconds": float("nan")},
        good | {"seconds": 1e300},
        good | {"seconds": 5.0, "memory": 1e300},
        good | {"seconds": 5.0, "memory": float("inf")},
        good | {"seconds": 5.0, "at": float("inf")},
        good | {"unit": None},
        good | {"unit": good["unit"] | {"architectures": "sm_90"}},
        good | {"unit": good["unit"] | {"source": 3}},
        {"unit": good["unit"]},
        [],
        7,
    ]
    lines = [json.dumps(line).encode() for line in damaged]
    lines += [b"\xff\xfe", b"", b"{", b"[" * 10_000, path.read_bytes()[:40]]
    (tmp_path / "other.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "folder.jsonl").mkdir()
    assert Records.open(tmp_path).estimate(UNIT, 0) == Estimate(100.0, int(1.1 * GB), known=True)


def test_what_can_not_be_true_is_not_recorded(tmp_path: Path) -> None:
    records = Records.open(tmp_path)
    records.add(UNIT, 0.0, 0.0, GB)
    records.add(UNIT, float("nan"), 0.0, GB)
    records.add(UNIT, 5.0, float("inf"), GB)
    records.add(UNIT, 5.0, 5.0, -1)
    assert files(tmp_path) == []
    assert not records.estimate(UNIT, 0).known


def test_unknown_memory_is_taken_for_much(tmp_path: Path) -> None:
    records = Records.open(tmp_path)
    records.add(UNIT, 5.0, 5.0, 0)
    assert records.estimate(UNIT, 0).memory == 2 << 30


def test_threads_that_add_at_once_leave_whole_lines(tmp_path: Path) -> None:
    records = Records.open(tmp_path)

    def add(number: int) -> None:
        for _ in range(25):
            records.add(UnitId("fused", f"{number}.cu"), 5.0 + number, 0, GB)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (path,) = files(tmp_path)
    assert len([json.loads(line) for line in path.read_bytes().splitlines()]) == 200
    assert Records.open(tmp_path).estimate(UnitId("fused", "7.cu"), 0).seconds == 12.0


def test_a_disk_that_takes_no_records_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    records = Records.open(tmp_path / "file" / "records")
    records.add(UNIT, 5.0, 5.0, GB)
    records.add(UNIT, 7.0, 7.0, GB)
    assert records.trouble is not None
    assert "can't be recorded" in records.trouble
    assert records.estimate(UNIT, 0).seconds == 6.0


def test_the_oldest_files_beyond_a_number_are_removed(tmp_path: Path) -> None:
    for number in range(205):
        path = tmp_path / f"{number:03}.jsonl"
        path.write_text("", encoding="utf-8")
        os.utime(path, (number, number))
    Records.open(tmp_path)
    assert [path.name for path in files(tmp_path)] == [f"{number:03}.jsonl" for number in range(5, 205)]
