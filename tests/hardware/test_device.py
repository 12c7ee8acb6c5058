"""The seam to the hardware: a real CPU, and a CUDA device over fake NVML and torch.cuda."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from lib.files import ROOT
from lib.hardware import apart, board, device, host, joules, memory_in_use, validity
from lib.records import record

FAKE_NVML = ROOT / "tests" / "fakes" / "nvml"
SHARED = {
    "date",
    "device",
    "gpu",
    "gpu_total_bytes",
    "driver",
    "cuda",
    "power_limit_w",
    "launch_s",
    "python",
    "platform",
    "cpu",
    "cpu_count",
    "host_score_per_s",
    "copy_bytes_per_s",
    "packages",
}


class Steps:
    """A device that writes down what it is asked, with a clock that ticks by one."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def synchronize(self) -> None:
        self.asked.append("synchronize")

    def clock_s(self) -> float:
        self.asked.append("clock")
        return float(len(self.asked))


def test_a_timed_call_is_idle_at_both_edges():
    steps = Steps()
    seconds, result = device.time_call(lambda: steps.asked.append("call") or "result", steps)
    assert steps.asked == ["synchronize", "clock", "call", "synchronize", "clock"]
    assert (seconds, result) == (3.0, "result")  # the clock showed 2 and 5


# --- which device


def test_names_of_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.open_device("cpu").kind == device.open_device("auto").kind == "cpu"
    with pytest.raises(ValueError, match='unknown device \'gpu\'; use "auto", "cuda" or "cpu"'):
        device.open_device("gpu")
    with pytest.raises(RuntimeError, match="torch sees no GPU.*nvidia-smi"):
        device.open_device("cuda")


# --- a CPU


def test_a_cpu_has_no_energy_and_says_why():
    cpu = device.CpuDevice()
    assert (cpu.energy_j(), cpu.power_w()) == (None, None)
    assert cpu.missing["energy"] == "no NVML energy counter: the device is a CPU"
    with cpu.power_trace() as trace:
        pass
    assert trace == []


def test_a_cpu_watches_every_tensor():
    """400 bytes live already; 4,000,000 come, 8,000,000 come and go, 4,000,000 stay."""
    with device.CpuDevice().watch_memory(resident_bytes=400) as usage:
        held = torch.zeros(1_000_000)
        passing = torch.zeros(2_000_000)
        del passing
    assert usage == {
        "baseline_bytes": 400,
        "peak_bytes": 12_000_400,
        "held_bytes": 4_000_400,
        "reserved_bytes": None,
        "used_bytes": None,
    }
    assert held.nbytes == 4_000_000


def test_a_cpu_counts_bytes_in_steps():
    """4,000 bytes stay, 8,000 come and go; then 400 come on top of the 4,000."""
    cpu = device.CpuDevice()
    with cpu.count_memory() as step:
        held = torch.zeros(1000)
        passing = torch.zeros(2000)
        del passing
        assert step() == (4_000, 12_000)
        more = torch.zeros(100)
        assert step() == (4_400, 4_400)
        del held
        assert step() == (400, 4_400)
    assert more.nbytes == 400
    assert (cpu.process_bytes(), cpu.gpu_used_bytes()) == (None, None)
    assert cpu.missing["used_bytes"] == "no NVML figure: the device is a CPU"


def test_nothing_allocated_is_the_baseline():
    with device.CpuDevice().watch_memory(resident_bytes=400) as usage:
        pass
    assert usage["peak_bytes"] == usage["held_bytes"] == usage["baseline_bytes"] == 400


def test_the_environment_says_what_the_numbers_depend_on(monkeypatch):
    monkeypatch.setattr(device.CpuDevice, "copy_bytes_per_s", lambda self: 5e9)
    env = device.CpuDevice().environment()
    assert env.keys() == SHARED
    assert (env["device"], env["gpu"], env["copy_bytes_per_s"]) == ("cpu", None, 5e9)
    assert env["packages"].keys() == {"torch", "transformers", "numpy", "nvidia-ml-py"}
    assert env["packages"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    assert env["cpu"] and env["cpu_count"] >= 1 and env["host_score_per_s"] > 0


def test_a_copy_counts_bytes_read_and_bytes_written(monkeypatch):
    times = iter([4.0, 2.0, 8.0])
    monkeypatch.setattr(device, "time_call", lambda call, where: (next(times), call()))
    assert device.CpuDevice().copy_bytes_per_s(size=1000, rounds=3) == 1000  # 2 x 1000 / 2 s


def test_free_memory_is_what_the_host_says():
    free = device.CpuDevice().free_bytes()
    assert free is None or 10**6 < free < 10**14


def test_an_absent_package_has_no_version():
    assert host.version("surely-not-installed") is None


# --- a GPU


def fake_torch_cuda(monkeypatch, log):
    """What CudaDevice asks of torch.cuda, for one board of 80 GB."""
    gpu = SimpleNamespace(
        uuid="fake", name="Fake GPU", total_memory=80 * 10**9, L2_cache_size=50 * 2**20
    )
    answers = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda index: gpu,
        "synchronize": lambda: log.append("synchronize"),
        "empty_cache": lambda: log.append("empty_cache"),
        "reset_peak_memory_stats": lambda: log.append("reset"),
        "memory_allocated": lambda: 1000 + 100 * log.count("work"),
        "max_memory_allocated": lambda: 1700,
        "memory_reserved": lambda: 2048 + 1000 * log.count("work"),
        "max_memory_reserved": lambda: 3048,
        "memory_stats": lambda: {
            "num_alloc_retries": 5 + log.count("work"),
            "requested_bytes.all.current": 990,
            "requested_bytes.all.peak": 1600,
            "inactive_split_bytes.all.current": 300,
        },
        "mem_get_info": lambda: (27 * 10**9, 80 * 10**9),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)


@pytest.fixture
def open_gpu(monkeypatch):
    """A CudaDevice whose NVML, in this process and in the sampler's, is the fake one."""

    def open_it(mode: str = "") -> device.CudaDevice:
        monkeypatch.setenv("FAKE_NVML", mode)
        monkeypatch.setenv("PYTHONPATH", str(FAKE_NVML), prepend=os.pathsep)
        spec = importlib.util.spec_from_file_location("pynvml", FAKE_NVML / "pynvml.py")
        nvml = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nvml)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        log: list[str] = []
        fake_torch_cuda(monkeypatch, log)
        gpu = device.open_device("auto")
        gpu.log = log
        return gpu

    return open_it


def test_a_gpu_is_found_in_nvml_by_its_uuid(open_gpu):
    gpu = open_gpu()
    assert (gpu.kind, gpu.torch_device, gpu.uuid, gpu.missing) == ("cuda", "cuda", "GPU-fake", {})
    assert gpu.power_w() == 300
    assert gpu.energy_j() == pytest.approx(300 * time.perf_counter(), abs=60)  # J, not mJ
    assert gpu.free_bytes() == 27 * 10**9


def test_a_slice_says_why_it_has_no_energy_and_measures_the_rest(open_gpu, monkeypatch):
    whole = device.CudaDevice.__init__

    def of_a_slice(gpu):
        known = torch.cuda.get_device_properties(0)
        part = SimpleNamespace(**vars(known) | {"name": "NVIDIA H100 80GB HBM3 MIG 1g.10gb"})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: part)
        whole(gpu)

    monkeypatch.setattr(device.CudaDevice, "__init__", of_a_slice)
    gpu = open_gpu()
    assert gpu.uuid == "MIG-fake" and "is a MIG slice: power and energy" in gpu.missing["energy"]
    assert (gpu.energy_j(), gpu.power_w(), gpu.board_state()) == (None, None, {})
    assert gpu.free_bytes() == 27 * 10**9
    with gpu.power_trace() as trace:
        pass
    assert trace == []


def test_memory_of_a_gpu_is_read_idle_and_from_a_fresh_peak(open_gpu):
    gpu = open_gpu()
    with gpu.watch_memory(resident_bytes=1) as usage:
        gpu.log.append("work")
    assert gpu.log == ["synchronize", "reset", "work", "synchronize"]
    assert usage == {
        "baseline_bytes": 1000,
        "peak_bytes": 1700,
        "held_bytes": 1100,
        "reserved_baseline_bytes": 2048,
        "reserved_bytes": 3048,
        "reserved_peak_bytes": 3048,
        "requested_baseline_bytes": 990,
        "requested_peak_bytes": 1600,
        "inactive_split_bytes": 300,
        "alloc_retries": 1,
        "slack_bytes": 3048 - 1700,
        "process_bytes": 51 * 10**9,
        "gpu_used_bytes": 52 * 10**9,
        "driver_used_bytes": (80 - 27) * 10**9,
        "gpu_processes": 1,
        "used_source": "NVML, this process",
        "used_baseline_bytes": 51 * 10**9,
        "used_bytes": 51 * 10**9,
        "context_bytes": 51 * 10**9 - 2048,
    }


def test_a_gpu_counts_bytes_in_steps_from_a_fresh_peak(open_gpu):
    gpu = open_gpu()
    with gpu.count_memory() as step:
        assert gpu.log == ["reset"]
        gpu.log.append("work")
        assert step() == (1100, 1700)
    assert gpu.log == ["reset", "work", "reset"]


@pytest.mark.parametrize(
    ("mode", "source", "used", "reason"),
    [
        ("", "NVML, this process", 51, None),
        ("container", "NVML, whole GPU", 52, "none of the 1 processes that NVML lists"),
        ("unsized", "NVML, whole GPU", 52, "NVML lists this process without its memory"),
        ("no-list", "NVML, whole GPU", 52, "NVML lists no processes: No Permission"),
        ("no-info", "NVML, this process", 51, None),
        ("shared", None, None, "none of the 2 processes that NVML lists"),
    ],
)
def test_whose_word_is_taken_for_what_is_in_use(open_gpu, mode, source, used, reason):
    """A figure of the whole GPU stands for this process only while it is alone there."""
    gpu = open_gpu(mode)
    with gpu.watch_memory(resident_bytes=1) as usage:
        pass
    assert usage.get("used_source") == source
    assert usage["used_bytes"] == (None if used is None else used * 10**9)
    assert (gpu.process_bytes() is None) == (reason is not None)
    assert gpu.missing.get("process_bytes", "").startswith(reason or "")
    assert ("used_bytes" in gpu.missing) == (mode == "shared")


def test_the_context_is_what_was_there_before_the_call():
    """900 in use of which 600 reserved; after the call 1,000, whatever made it grow."""
    before, after = ({"process_bytes": n, "gpu_used_bytes": n + 5} for n in (900, 1000))
    assert memory_in_use.figure(before, after, reserved_bytes=600) == {
        "used_source": "NVML, this process",
        "used_baseline_bytes": 900,
        "used_bytes": 1000,
        "context_bytes": 300,
    }
    lost = after | {"process_bytes": None}  # a source counts only where it has both edges
    assert (
        memory_in_use.figure(before, lost, reserved_bytes=600)["used_source"] == "NVML, whole GPU"
    )


def test_without_nvml_the_driver_tells_what_is_in_use(open_gpu, monkeypatch):
    open_gpu()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu = device.CudaDevice()
    with gpu.watch_memory(resident_bytes=1) as usage:
        pass
    assert (usage["used_source"], usage["used_bytes"]) == ("CUDA driver, whole GPU", 53 * 10**9)
    assert gpu.missing["process_bytes"] == gpu.missing["gpu_used_bytes"] == "no NVML"


def test_the_environment_of_a_gpu_has_its_limits(open_gpu, monkeypatch):
    monkeypatch.setattr(device.CudaDevice, "launch_s", lambda self: 3e-6)
    monkeypatch.setattr(device.CudaDevice, "copy_bytes_per_s", lambda self: 2e12)
    env = open_gpu().environment()
    assert env.keys() == SHARED | {
        "gpu_uuid",
        "cache_bytes",
        "sm_clock_max_hz",
        "memory_clock_max_hz",
    }
    assert (env["gpu"], env["driver"], env["power_limit_w"]) == ("Fake GPU", "999.1", 700)
    assert (env["sm_clock_max_hz"], env["gpu_total_bytes"]) == (1_980_000_000, 80 * 10**9)


def test_a_trace_is_read_by_another_process_and_gives_the_power(open_gpu):
    gpu = open_gpu()
    before_s = time.perf_counter()
    with gpu.power_trace(period_s=0.01) as trace:
        assert trace == []  # it fills when the block ends
        time.sleep(0.8)
        after_s = time.perf_counter()
    assert len(trace) > 40
    assert all(before_s < row["t_s"] for row in trace) and trace[-1]["t_s"] > after_s - 0.1
    assert {(row["power_w"], row["instant_w"]) for row in trace} == {(300.0, 300.5)}
    middle_s = (trace[0]["t_s"] + trace[-1]["t_s"]) / 2
    joules_, reason = joules.counter_j(trace, middle_s - 0.2, middle_s + 0.2)
    assert reason == "" and joules_ == pytest.approx(300 * 0.4, rel=0.2)


def test_a_reading_says_how_long_it_took_and_at_times_how_the_board_is(open_gpu):
    with open_gpu().power_trace(period_s=0.01) as trace:
        time.sleep(0.3)
    always = {"t_s", "latency_s", "gpu", "energy_j", "instant_w", "power_w", "nvml_s"}
    assert all(row.keys() >= always and 0 < row["latency_s"] < 0.1 for row in trace)
    first = trace[0]
    assert (first["temperature_c"], first["memory_c"], first["sm_hz"]) == (48, 55, 1_755_000_000)
    assert (first["power_cap_s"], first["hw_thermal_s"], len(first["pids"])) == (2.0, 0.0, 1)
    assert "power_brake_s" not in first  # this board does not tell
    assert first["power_limit_w"] == 700 and first["nvml_s"] == 1700
    assert sum("sm_hz" in row for row in trace) <= 1 + len(trace) // 10


def test_several_gpus_are_read_together_by_uuid_and_in_the_order_given(open_gpu):
    with open_gpu().power_trace(period_s=0.01, uuids=["GPU-other", "GPU-fake"]) as trace:
        time.sleep(0.3)
    first, second = joules.boards(trace)
    assert abs(len(first) - len(second)) <= 1
    assert {row["power_w"] for row in first} == {200.0}
    assert {row["power_w"] for row in second} == {300.0}


def test_the_gpus_of_a_model_are_named_as_cuda_counts_them(open_gpu, monkeypatch):
    """CUDA_VISIBLE_DEVICES may change its order: index 0 is whatever CUDA says it is."""
    gpu = open_gpu()
    cuda = [SimpleNamespace(uuid="other"), SimpleNamespace(uuid="fake")]
    monkeypatch.setattr(torch.cuda, "get_device_properties", cuda.__getitem__)
    places = [torch.device("cuda", 1), torch.device("cuda", 0), torch.device("cpu")]
    net = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=p) for p in places])
    assert gpu.gpus_of(net) == ["GPU-other", "GPU-fake"]
    assert device.CpuDevice().gpus_of(net) == []


ONE = {"gpu": "Fake GPU", "gpu_uuid": "GPU-fake", "copy_bytes_per_s": 3e12, "device": "cuda"}
TWO = [
    {"uuid": uuid, "gpu": "Fake GPU", "gpu_total_bytes": 80 * 10**9}
    for uuid in ("GPU-fake", "GPU-other")
]


@pytest.mark.parametrize(
    ("mode", "link"), [("", "NVLink"), ("unlinked", "no NVLink"), ("no-link", None)]
)
def test_several_boards_are_read_as_one_device(open_gpu, mode, link):
    """300 W and 200 W, each with 52 GB in use of 80."""
    open_gpu(mode)
    boards = apart.BoardDevice(ONE, TWO, 2)
    assert boards.power_w() == 500 and boards.gpus_of(None) == ["GPU-fake", "GPU-other"]
    assert boards.gpu_used_bytes() == 104 * 10**9 and boards.free_bytes() == 56 * 10**9
    assert [one.gpu_used_bytes() for one in boards.boards] == [52 * 10**9] * 2
    assert boards.energy_j() == pytest.approx(sum(b.energy_j() for b in boards.boards), rel=1e-3)
    env = boards.environment()
    assert (env["gpu"], env["devices"], env["link"]) == ("2 x Fake GPU", 2, link)
    assert env["gpu_total_bytes"] == 160 * 10**9 and env["copy_bytes_per_s"] == 6e12
    assert [(b["uuid"], b["nvml_index"]) for b in env["boards"]] == [
        ("GPU-fake", 0), ("GPU-other", 1)
    ]  # fmt: skip
    assert record.board(env) == ("Fake GPU", 2)
    with boards.power_trace(period_s=0.01) as trace:
        time.sleep(0.2)
    assert [part[0]["power_w"] for part in joules.boards(trace)] == [300.0, 200.0]


def test_one_of_several_boards_is_what_it_was(open_gpu):
    open_gpu()
    one = apart.BoardDevice(ONE, TWO, 1)
    assert one.environment() == ONE and one.gpus_of(None) == ["GPU-fake"]
    assert one.power_w() == 300 and record.board(ONE) == ("Fake GPU", 1)


def test_a_board_that_tells_nothing_leaves_no_sum(open_gpu):
    open_gpu()
    boards = apart.BoardDevice(ONE, [TWO[0], TWO[1] | {"uuid": "GPU-gone"}], 2)
    assert boards.power_w() is None and boards.gpu_used_bytes() is None
    assert "no NVML power readings" in boards.missing["energy"]


@pytest.mark.parametrize(
    ("gpus", "text"),
    [
        (TWO[:1], r"devices: 2 were asked for, and CUDA sees 1 .Fake GPU.; use DEVICES=1"),
        ([TWO[0], TWO[1] | {"gpu": "A100"}], r"different kinds .A100, Fake GPU.*CUDA_VISIBLE"),
    ],
)
def test_boards_that_cannot_share_a_model_are_refused(open_gpu, gpus, text):
    open_gpu()
    with pytest.raises(RuntimeError, match=text):
        apart.BoardDevice(ONE, gpus, 2)
    with pytest.raises(RuntimeError, match="devices: 2 are GPUs, and this is a CPU"):
        apart.open_apart("cpu", 2)


def test_the_environment_names_every_gpu_that_can_be_seen(open_gpu, monkeypatch):
    monkeypatch.setattr(device.CudaDevice, "launch_s", lambda self: 3e-6)
    gpu = open_gpu()
    assert "boards" not in gpu.card()
    cuda = [
        SimpleNamespace(uuid=name, name="Fake GPU", total_memory=8) for name in ("fake", "other")
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", cuda.__getitem__)
    assert [one["uuid"] for one in gpu.card()["boards"]] == ["GPU-fake", "GPU-other"]


def test_a_driver_without_the_fields_is_asked_by_function(open_gpu):
    with open_gpu("old").power_trace(period_s=0.01) as trace:
        time.sleep(0.2)
    assert all({"energy_j", "power_w"} <= row.keys() for row in trace)
    assert not any("instant_w" in row for row in trace)


def test_a_sampler_that_dies_leaves_what_it_had_read(open_gpu):
    with open_gpu("dies").power_trace(period_s=0.01) as trace:
        time.sleep(0.5)
        stop_s = time.perf_counter()
    assert 0 < len(trace) < 10
    window = validity.judge(trace, trace[0]["t_s"], stop_s)
    assert window.energy_j is None and window.reason


def test_a_line_that_was_cut_off_is_left_out():
    assert list(board.rows('{"t_s": 1}\n{"t_s": 2}\n{"t_s": 3, "ene')) == [
        {"t_s": 1},
        {"t_s": 2},
    ]


def sampler_started(monkeypatch):
    """Popen that remembers the processes it started."""
    started, popen = [], board.subprocess.Popen

    def remember(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(board.subprocess, "Popen", remember)
    return started


def test_the_sampler_ends_with_the_block_however_the_block_ends(open_gpu, monkeypatch):
    gpu, started = open_gpu(), sampler_started(monkeypatch)
    with gpu.power_trace(period_s=5.0):  # closing its input ends the wait, not the period
        start_s = time.perf_counter()
    assert time.perf_counter() - start_s < 3
    with pytest.raises(KeyError), gpu.power_trace():
        raise KeyError("the measured code failed")
    assert [process.returncode for process in started] == [0, 0]


def test_a_reading_that_failed_is_a_row_with_its_error(open_gpu):
    with open_gpu("flaky").power_trace(period_s=0.01) as trace:
        time.sleep(0.5)
    failed = [row for row in trace if "error" in row]
    assert {row["error"] for row in failed} == {"Unknown Error"}
    assert not any("energy_j" in row for row in failed)
    assert len(trace) / 4 < len(failed) < len(trace) / 1.5
    assert (
        failed[-1] is trace[-1]
        or any(  # after a failure it asks less often
            late["t_s"] - early["t_s"] > 0.09 for early, late in zip(trace, trace[1:], strict=False)
        )
    )


def test_a_gpu_without_the_counter_still_tells_its_power(open_gpu):
    gpu = open_gpu("no-counter")
    assert (gpu.missing, gpu.energy_j(), gpu.power_w()) == ({}, None, 300)
    with gpu.power_trace(period_s=0.01) as trace:
        time.sleep(0.2)
    assert all("power_w" in row and "energy_j" not in row for row in trace)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("no-power", "Not Supported"),
        ("split", "the board is split (MIG is on), its readings are of all parts"),
    ],
)
def test_a_gpu_that_tells_nothing_of_its_own_gives_missing_with_the_reason(
    open_gpu, monkeypatch, mode, reason
):
    gpu, started = open_gpu(mode), sampler_started(monkeypatch)
    assert gpu.missing == {"energy": f"no NVML power readings of this GPU: {reason}"}
    assert (gpu.energy_j(), gpu.power_w(), gpu.board_state()) == (None, None, {})
    with gpu.power_trace() as trace:
        pass
    assert trace == [] and started == []


def test_the_state_of_a_board_says_none_where_the_driver_does_not_tell(open_gpu):
    assert open_gpu().board_state() == {
        "nvml_index": 0,
        "driver": "999.1",
        "vbios": "96.00",
        "persistence": True,
        "power_limit_w": 700,
        "power_limit_max_w": None,
        "temperature_c": 48,
    }
    assert device.CpuDevice().board_state() == {}


def test_what_holds_the_clocks_back_is_read_where_there_is_a_board(open_gpu):
    state = open_gpu().clocks_state()
    assert (state["power_cap_s"], state["sm_hz"], state["throttle_reasons"]) == (2.0, 1755e6, 4)
    assert device.CpuDevice().clocks_state() == {}


def test_a_gpu_without_nvml_gives_missing_with_the_reason(open_gpu, monkeypatch):
    gpu = open_gpu()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu = device.CudaDevice()
    assert gpu.missing["energy"].startswith("no NVML power readings of this GPU: import of pynvml")
    assert gpu.energy_j() is None
    monkeypatch.setattr(device.CudaDevice, "launch_s", lambda self: 3e-6)
    assert gpu.card()["gpu"] == "Fake GPU" and gpu.card()["power_limit_w"] is None


def test_a_sampler_that_cannot_start_is_an_error_not_an_empty_trace(open_gpu, capfd):
    gpu = open_gpu()
    gpu.uuid = "GPU-another"
    message = r"the power sampler gave no reading \(exit 1\)"
    with pytest.raises(RuntimeError, match=message), gpu.power_trace():
        pytest.fail("the block must not run")
    assert "Not Found" in capfd.readouterr().err
