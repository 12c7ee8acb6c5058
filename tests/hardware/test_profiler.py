"""Device-busy time from a profiler's events: what overlaps counts once, what is no work never."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from lib.hardware import device, profiler


def event(name, start_ns, duration_ns, where=DeviceType.CUDA, annotation=False):
    return SimpleNamespace(
        name=lambda: name,
        start_ns=lambda: start_ns,
        duration_ns=lambda: duration_ns,
        device_type=lambda: where,
        is_user_annotation=lambda: annotation,
    )


@pytest.mark.parametrize(
    "spans, length",
    [
        ([], 0),
        ([(5, 8)], 3),
        ([(0, 2), (4, 5)], 3),
        ([(0, 4), (2, 6)], 6),
        ([(0, 9), (2, 3)], 9),
        ([(4, 6), (0, 4)], 6),
        ([(0, 1), (0, 3), (2, 5), (7, 8)], 6),
    ],
)
def test_the_union_of_intervals(spans, length):
    assert profiler.union_ns(spans) == length


def test_kernels_and_copies_work_and_nothing_else_does():
    events = [
        event("gemm", 0, 100),
        event("softmax on a second stream", 50, 100),  # overlaps by half
        event("Memcpy DtoH (Device -> Pinned)", 300, 20),
        event("Memset (Device)", 400, 5),
        event("cudaLaunchKernel", 0, 900, where=DeviceType.CPU),
        event("a named range", 0, 1000, annotation=True),
    ]
    work = profiler.counted(events)
    assert work.busy_s == pytest.approx(175e-9) and work.kernels == 2


def test_time_by_kernel_is_summed_over_its_launches_and_template_arguments():
    events = [
        event("void at::native::reduce_kernel<512, 1, Op<float>>(Op)", 0, 30),
        event("void at::native::reduce_kernel<256, 1, Op<half>>(Op)", 40, 10),
        event("triton_red_fused_add_7", 60, 100),
        event("void (anonymous namespace)::indexed(long*)", 200, 4),
        event("Memcpy DtoD (Device -> Device)", 300, 20),
    ]
    assert profiler.counted(events).by_name == {
        "at::native::reduce_kernel": (2, pytest.approx(40e-9)),
        "triton_red_fused_add_7": (1, pytest.approx(100e-9)),
        "(anonymous namespace)::indexed": (1, pytest.approx(4e-9)),
        "Memcpy DtoD": (1, pytest.approx(20e-9)),
    }


def test_the_device_is_idle_at_both_edges_of_the_profiled_call(monkeypatch):
    calls = []

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]
            events = SimpleNamespace(events=lambda: [event("gemm", 0, 7)])
            self.profiler = SimpleNamespace(kineto_results=events)

        def __enter__(self):
            calls.append("start")
            return self

        def __exit__(self, *error):
            calls.append("stop")

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    fake = SimpleNamespace(synchronize=lambda: calls.append("synchronize"))
    work = profiler.gpu_work(lambda: calls.append("call"), fake)
    assert work == (7e-9, 1, {"gemm": (1, 7e-9)})
    assert calls == ["synchronize", "start", "call", "synchronize", "stop"]


def test_the_events_of_the_real_profiler_can_be_read():
    """On a CPU there is no GPU event; the names of the fields are the library's own."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as watched:
        torch.ones(3) + 1
    events = watched.profiler.kineto_results.events()
    assert events and profiler.counted(events) == (0, 0, {})


def test_a_cpu_is_not_asked(monkeypatch):
    cpu = device.CpuDevice()
    assert cpu.busy(lambda: pytest.fail("called")) is None
    assert "the device is a CPU" in cpu.missing["busy"]


@pytest.mark.parametrize("seen, answer", [((0.5, 9, {}), (0.5, 9, {})), ((0.0, 0, {}), None)])
def test_a_gpu_whose_profiler_is_blind_says_so(monkeypatch, seen, answer):
    gpu = object.__new__(device.CudaDevice)
    gpu.missing = {}
    monkeypatch.setattr(profiler, "gpu_work", lambda call, where: profiler.Work(*seen))
    assert gpu.busy(lambda: None) == answer
    assert ("busy" in gpu.missing) == (answer is None)
