"""Which devices compute, and what is said of those that do not."""

import pytest
import torch

from dsv4_kernels.backend import choose_backend


def test_the_cpu() -> None:
    for name in ("cpu", "cpu:0"):
        backend = choose_backend(name)
        assert (backend.name, backend.device) == ("torch", torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "why"),
    [("abacus", "unknown device"), ("", "unknown device"), ("mps", "on cpu and cuda"), ("meta", "on cpu and cuda")],
)
def test_unknown_devices(device: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        choose_backend(device)


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=r"'cuda': this build of torch \(.*\) has no CUDA"):
        choose_backend("cuda")


def pretend(monkeypatch: pytest.MonkeyPatch, found: int) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "An Old Card")


def test_a_machine_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 0)
    with pytest.raises(ValueError, match="no NVIDIA GPU with a working driver"):
        choose_backend("cuda")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 2)
    with pytest.raises(ValueError, match="'cuda:2': this machine's GPUs are cuda:0 to cuda:1"):
        choose_backend("cuda:2")


def test_a_gpu_that_torch_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 1)

    def refused(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore lines")

    monkeypatch.setattr(torch, "zeros", refused)
    with pytest.raises(ValueError, match=r"'cuda' \(An Old Card\) does not compute: .* on the device$"):
        choose_backend("cuda")
