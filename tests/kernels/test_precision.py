"""Where float32 products may be in TF32, and that the setting never outlasts its context."""

from __future__ import annotations

import pytest
import torch

from awqkit.kernels.precision import full_precision, tensor_cores


def test_products_are_in_tf32_on_a_gpu_but_for_what_asks_for_more() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    with tensor_cores(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_cpu_is_left_alone_and_a_failure_puts_the_setting_back() -> None:
    with pytest.raises(ValueError, match="stop"), tensor_cores(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "highest"
        raise ValueError("stop")
    with pytest.raises(ValueError, match="stop"), tensor_cores(torch.device("cuda")):
        raise ValueError("stop")
    assert torch.get_float32_matmul_precision() == "highest"
