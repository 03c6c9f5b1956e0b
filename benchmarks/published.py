"""Published WikiText-2 perplexities of Llama-2-7B, 2048-token windows, with where each was found.

Write-ups differ in the second digit: windows, seeds and the GPTQ variant are not the same everywhere. The GPTQ paper
(arXiv 2210.17323) has no Llama-2 row; its method's figures are those that others measured. GPTQ's 5.61 and 6.29 stand
in write-ups only and were not confirmed in a paper's table.
"""

from __future__ import annotations

from collections.abc import Mapping

SOURCES = {
    "awq": "AWQ, Lin et al. 2023, arXiv 2306.00978, table 4 (GPTQ also with reordering: 5.63, 6.42)",
    "omniquant": "OmniQuant, Shao et al. 2023, arXiv 2308.13137, weight-only results",
    "write-ups": "write-ups about quantized Llama-2, not confirmed in a paper's table",
    "efficientqat": "EfficientQAT, Chen et al. 2024, arXiv 2407.11062, table of its model cards (trains the weights)",
}
FULL_PRECISION = 5.47
# setting -> name of a method of ours, or of one that awqkit does not have -> source -> perplexity
LLAMA2_7B: dict[str, dict[str, dict[str, float]]] = {
    "INT4 g128": {
        "rtn": {"awq": 5.73},
        "gptq": {"awq": 5.69, "write-ups": 5.61},
        "awq": {"awq": 5.60},
        "EfficientQAT": {"efficientqat": 5.53},
    },
    "INT4 g32": {},
    "INT3 g128": {
        "rtn": {"awq": 6.66},
        "gptq": {"awq": 6.43, "write-ups": 6.29},
        "awq": {"awq": 6.24},
        "OmniQuant": {"omniquant": 6.03},
        "EfficientQAT": {"efficientqat": 5.81},
    },
}


def published_text(figures: Mapping[str, float]) -> str:
    """The figures of one method, smallest to largest, and how far above full precision they are.

    >>> published_text({"awq": 5.69, "write-ups": 5.61})
    '5.61 to 5.69 (+2.6 to 4.0 %)'
    >>> published_text({"awq": 5.60})
    '5.60 (+2.4 %)'
    """
    values = sorted(figures.values())
    gaps = [f"{100 * (value / FULL_PRECISION - 1):.1f}" for value in values]
    return f"{' to '.join(f'{value:.2f}' for value in values)} (+{' to '.join(gaps)} %)" if values else "-"
