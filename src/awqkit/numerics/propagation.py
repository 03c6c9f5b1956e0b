"""Aiming at the original output from the quantized stream's input.

    W* = W + β W T,   T = (C − Ĥ)(Ĥ + λ)⁻¹,   C = E[x x̂ᵀ],  Ĥ = E[x̂ x̂ᵀ]

x̂ is the input that the linear will really get, after everything before it was quantized. With β = 1 W* x̂ is the
least-squares answer to W x (QEP, Arai 2025, section 4; GPTAQ, Li 2025, section 3). β < 1 keeps part of W: the whole
correction fits errors of the calibration text that other text does not have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from awqkit.numerics.rounding_metric import RoundingMetric

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def correction(cross_moment: Tensor, metric: RoundingMetric) -> Tensor:
    """T `[in, in]` float32; cross_moment: C `[in, in]`, rows the original's channels; metric: of Ĥ, damped."""
    return metric.solve(cross_moment - metric.moment)


def best_strength(
    weights: Sequence[Tensor], row_weights: Sequence[Tensor], shift: Tensor, cross_moment: Tensor, moment: Tensor
) -> float:
    """The β of `STRENGTHS` nearest to the minimum of E‖W x − W*(β) x̂‖² on other rows than T was made of.

    weights: `[out_i, in]` of all readers of the input; row_weights: `[out_i]`; shift: T; cross_moment, moment: C and Ĥ
    of the other rows. The error is a parabola in β: β = ⟨W T, W (C − Ĥ)⟩ / ⟨W T Ĥ, W T⟩.
    """
    gain, curvature = 0.0, 0.0
    for weight, row_weight in zip(weights, row_weights, strict=True):
        direction = weight @ shift
        gain += float(((direction * (weight @ (cross_moment - moment))).sum(dim=1) * row_weight).sum())
        curvature += float((((direction @ moment) * direction).sum(dim=1) * row_weight).sum())
    best = gain / curvature if curvature > torch.finfo(torch.float32).tiny else 0.0
    return min(STRENGTHS, key=lambda strength: abs(strength - best))
