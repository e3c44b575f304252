"""Small tensors to the host: values, shapes and dtypes survive, and later changes do not reach the copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gns.capture.host import HostCopy


def test_shapes_dtypes_and_order_survive():
    tensors = [
        torch.arange(6.0).view(2, 3),
        torch.tensor(7.0, dtype=torch.float64),
        torch.tensor([8.0]),
        torch.zeros(0),
        torch.tensor([[9.0]], dtype=torch.float64, requires_grad=True),
    ]
    copy = HostCopy(tensors)
    assert copy.ready()
    for got, sent in zip(copy.get(), tensors, strict=True):
        assert got.shape == tuple(sent.shape)
        assert got.dtype == (np.float64 if sent.dtype is torch.float64 else np.float32)
        assert np.array_equal(got, sent.detach().numpy())


def test_nothing_is_nothing():
    assert HostCopy([]).get() == []
    assert HostCopy([]).ready()


@pytest.mark.parametrize("count", [1, 3])
def test_the_copy_does_not_share_memory(count):
    tensors = [torch.ones(2) for _ in range(count)]
    copy = HostCopy(tensors)
    for t in tensors:
        t.fill_(5)
    assert all((v == 1).all() for v in copy.get())


def test_it_can_be_read_twice():
    copy = HostCopy([torch.tensor(3.0)])
    assert float(copy.get()[0]) == float(copy.get()[0]) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_devices_mix():
    copy = HostCopy([torch.ones(2, device="cuda"), torch.zeros(1), torch.tensor(4.0, device="cuda")])
    assert [v.tolist() for v in copy.get()] == [[1, 1], [0], 4.0]
    assert copy.ready()
