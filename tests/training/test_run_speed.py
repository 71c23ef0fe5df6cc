"""Speed of a run: samples per second, share of time waiting for data, MFU, and peak rates of devices."""

import time
from collections.abc import Iterator

import pytest
import torch

from training.run import hardware_peaks as peaks
from training.run.hardware_peaks import gpu_peak, peak_flops
from training.run.throughput import Throughput


class Clock:
    """Give a time that only the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def items(self, num_items: int, wait_s: float) -> Iterator[int]:
        for number in range(num_items):
            self.now += wait_s
            yield number


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_rates_are_means_since_the_last_line_and_leave_pauses_out(clock: Clock) -> None:
    meter = Throughput(torch.device("cpu"), peak_flops=1000.0)
    for _ in meter.waiting(clock.items(4, wait_s=0.5)):
        clock.now += 1.5
        meter.step(num_samples=10, flops=200.0)
    with meter.paused():
        clock.now += 100
    rates = meter.rates()
    assert rates["samples_per_s"] == pytest.approx(5) and rates["step_s"] == pytest.approx(2)
    assert rates["data_wait"] == pytest.approx(0.25)
    assert rates["mfu"] == pytest.approx(800 / 8 / 1000)
    assert rates["elapsed_s"] == pytest.approx(108)
    clock.now += 1
    meter.step(num_samples=3)
    assert meter.rates()["samples_per_s"] == pytest.approx(3), "the next line starts from nothing"


def test_waiting_counts_from_the_first_item(clock: Clock) -> None:
    meter = Throughput(torch.device("cpu"))
    assert list(meter.waiting(clock.items(3, wait_s=1.0))) == [0, 1, 2]
    clock.now += 3
    assert meter.rates()["data_wait"] == pytest.approx(0.5)


def test_no_mfu_without_a_peak(clock: Clock) -> None:
    meter = Throughput(torch.device("cpu"), peak_flops=None)
    clock.now += 1
    meter.step(1, flops=5.0)
    assert meter.rates()["mfu"] is None


@pytest.mark.parametrize(
    "name, bf16, tf32, fp32",
    [
        ("NVIDIA H200", 989, 494, 67),
        ("NVIDIA H100 80GB HBM3", 989, 494, 67),
        ("NVIDIA H100 PCIe", 756, 378, 51),
        ("NVIDIA H100 NVL", 835, 417, 60),
        ("NVIDIA GH200 480GB", 989, 494, 67),
        ("NVIDIA B200", 2250, 1100, 75),
        ("NVIDIA GB200", 2500, 1250, 80),
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
        ("NVIDIA A10", 125, 62.5, 31.2),
        ("NVIDIA L40S", 362, 183, 91.6),
        ("NVIDIA L40", 181, 90.5, 90.5),
        ("NVIDIA L4", 121, 60, 30.3),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
        ("Tesla V100-SXM2-16GB", 15.7, 15.7, 15.7),
        ("Tesla T4", 8.1, 8.1, 8.1),
    ],
)
def test_known_gpus_have_their_dense_peak(name: str, bf16: float, tf32: float, fp32: float) -> None:
    peaks_of = (gpu_peak(name, "bf16"), gpu_peak(name, "fp32", tf32=True), gpu_peak(name, "fp32"))
    assert peaks_of == pytest.approx([tflops * 1e12 for tflops in (bf16, tf32, fp32)])


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA T400", "Something new"])
def test_a_gpu_that_is_not_known_has_no_peak_rather_than_a_wrong_one(name: str) -> None:
    assert gpu_peak(name, "bf16") is None


@pytest.fixture
def unmeasured() -> Iterator[None]:
    peaks._measured.cache_clear()
    yield
    peaks._measured.cache_clear()


def test_a_cpu_is_measured_by_real_products(unmeasured: None) -> None:
    assert 0 < peak_flops(torch.device("cpu"), "fp32") < float("inf")


@pytest.mark.parametrize("product_s, num_products", [(0.125, 4), (3.0, 1)])
def test_a_cpu_is_measured_once_and_quickly(
    product_s: float, num_products: int, unmeasured: None, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It multiplies for half a second, at any speed."""
    sizes: list[int] = []

    def multiply(one: torch.Tensor, other: torch.Tensor) -> None:
        clock.now += product_s
        sizes.append(len(one))

    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    first = peak_flops(torch.device("cpu"), "fp32")
    assert first == 2 * sizes[0] ** 3 / product_s and len(sizes) == num_products
    assert peak_flops(torch.device("cpu"), "fp32") == first and len(sizes) == num_products
