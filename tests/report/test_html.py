"""The report page: what is on it, that it loads nothing, that text stays text, and what a real browser draws."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest
from browser import browser_command, open_page
from plotly.graph_objects import Figure as PlotlyFigure
from sample_report import BLOCK_UNDONE, COMPARISON, FOLD_UNDONE, LINEAR_UNDONE, LINEARS, TIMINGS, sample_report

from awqkit.report.analysis import short_names, type_of
from awqkit.report.figures import Figure
from awqkit.report.html import render_html
from awqkit.report.page import Heading, page
from awqkit.report.sections import Section

SECTIONS = ("errors", "weights", "scales", "search", "saliency", "time", "undone", "cautions", "settings")
VOID = {"meta", "br", "wbr", "link", "img", "input"}


class Elements(HTMLParser):
    """Every element with its attributes, and all text outside script and style; scripts apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text, self.scripts = "", []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text += data

    def ids(self, tag: str) -> list[str]:
        return [attributes["id"] or "" for name, attributes in self.found if name == tag and "id" in attributes]

    def figures(self) -> list[dict[str, Any]]:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def whole() -> str:
    """The page of a run with a comparison."""
    return render_html(sample_report(), TIMINGS, COMPARISON)


@pytest.fixture(scope="module")
def elements(whole: str) -> Elements:
    return Elements(whole)


def test_every_section_is_there_once_and_in_order(elements: Elements) -> None:
    assert elements.ids("section") == ["comparison", *SECTIONS]
    assert elements.open == []


def test_every_figure_has_its_place_and_is_what_plotly_accepts(elements: Elements) -> None:
    figures = elements.figures()
    assert elements.ids("div") == [f"plot-{figure['name']}" for figure in figures]
    kinds = Counter(figure["name"].split("-")[0] for figure in figures)
    assert kinds == {
        "perplexity": 2, "kl": 2, "error": 7, "map": 2, "scale": 4, "alpha": 1, "clip": 1, "saliency": 1, "stages": 1,
    }  # fmt: skip
    for figure in figures:
        text = re.sub(r'"@[\w-]+"', '"#123456"', json.dumps(figure))  # the theme's colors
        PlotlyFigure(
            data=json.loads(text)["data"], layout=json.loads(text)["layout"]
        )  # raises for what it does not know


def test_colors_of_figures_are_in_both_themes(whole: str, elements: Elements) -> None:
    light, dark = (
        set(re.findall(r"--([\w-]+):", part))
        for part in whole.split("</style>")[0].split("@media (prefers-color-scheme")[:2]
    )
    used = set(re.findall(r'"@([\w-]+)"', json.dumps(elements.figures())))
    assert used
    assert used <= light
    assert used <= dark


def test_nothing_is_loaded_from_outside(whole: str, elements: Elements) -> None:
    for tag, attributes in elements.found:
        assert tag not in ("link", "img", "iframe", "object", "embed")
        assert not {"src", "href", "srcset", "action", "data", "poster"} & set(attributes)
    policy = next(attributes["content"] for tag, attributes in elements.found if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    style = whole.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize("reason", [FOLD_UNDONE, BLOCK_UNDONE, LINEAR_UNDONE, "matches --ignore"])
def test_every_fallback_is_told_once_with_its_reason(elements: Elements, reason: str) -> None:
    assert elements.text.count(reason) == 1  # the block's reason is not repeated for its four folds


def test_text_of_a_report_stays_text() -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'"
    report = sample_report(model=evil)
    report["blocks"][0]["linears"][0]["fallback"] = evil
    report["recipe"]["name"] = evil
    report["cautions"] = [evil]
    report["blocks"][0]["folds"][0]["producer"] = f"a.{evil}"
    for linear in report["blocks"][1]["linears"]:
        linear["name"] = f"model.layers.1.{evil}"
    rows = [{**row, "method": f"{row['method']}{evil}", "text": evil} for row in COMPARISON]
    rendered = render_html(report, {"seconds": 1.0, "stages": {evil: 1.0}}, rows)
    found = Elements(rendered)
    plain = Elements(render_html(sample_report(), TIMINGS, COMPARISON))
    assert Counter(tag for tag, _ in found.found)["script"] == Counter(tag for tag, _ in plain.found)["script"] == 3
    assert not [tag for tag, attributes in found.found if tag == "img" or "onerror" in attributes]
    assert evil in found.text.replace("\n", "")
    labels = json.dumps(
        [figure["data"] for figure in found.figures()] + [figure["layout"] for figure in found.figures()]
    )
    assert "<img" not in labels  # plotly reads a little HTML in labels
    assert "&lt;img" in labels


def test_no_figure_can_end_the_script_that_holds_it() -> None:
    figure = Figure("one", "", [{"name": "</script><b>"}], {}, 100)
    found = Elements(page(Heading("", "", "", ()), [Section("a", "", (), (figure,))], [], ""))
    assert found.figures()[0]["data"] == [{"name": "</script><b>"}]
    assert "b" not in {tag for tag, _ in found.found}


def test_a_run_without_calibration_has_weight_errors_and_no_searches() -> None:
    report = sample_report()
    report["recipe"] = {**report["recipe"], "name": "rtn", "channel_scale": "none", "clip": "none"}
    report["calibration"], report["mean_output_errors"] = None, None
    for block in report["blocks"]:
        block["folds"], block["held_out_error"], block["held_out_error_nearest"] = [], None, None
        for linear in block["linears"]:
            linear.update(output_error=None, output_error_nearest=None, clip_counts=[], saliency=[])
    found = Elements(render_html(report, None, None))
    assert found.ids("section") == ["errors", "undone", "cautions", "settings"]
    assert "No calibration text was read" in found.text


def test_a_report_of_an_awqkit_that_kept_no_distributions_still_makes_a_page() -> None:
    report = sample_report()
    for block in report["blocks"]:
        for fold in block["folds"]:
            del fold["scale"], fold["alpha"]["counts"]
        for linear in block["linears"]:
            del linear["clip_counts"], linear["saliency"]
    assert Elements(render_html(report, TIMINGS, None)).ids("section") == [
        "errors", "weights", "time", "undone", "cautions", "settings",
    ]  # fmt: skip


def test_a_comparison_alone_makes_a_page_with_a_pair_of_figures_for_each_text_and_bit_width() -> None:
    rows = [{**row, "text": text} for text in ("near", "far") for row in COMPARISON]
    found = Elements(render_html(None, None, rows))
    assert found.ids("section") == ["comparison"]
    names = [figure["name"] for figure in found.figures()]
    assert names == [f"{kind}-{index}" for index in range(4) for kind in ("perplexity", "kl")]


def test_bars_of_perplexity_start_at_the_original() -> None:
    bars = Elements(render_html(None, None, COMPARISON)).figures()[0]["data"][0]
    assert bars["x"] == pytest.approx([30 * 0.15, 30 * 0.08, 30 * 0.04])
    assert bars["text"] == ["24.10", "22.00", "20.80"]


def test_a_heat_map_cell_is_the_logarithm_of_the_ratio(elements: Elements) -> None:
    maps = {figure["name"]: figure["data"][0] for figure in elements.figures() if figure["name"].startswith("map")}
    assert maps["map-output"]["z"][0][0] == pytest.approx(-0.737, abs=1e-3)  # log2(3 / 5)
    assert maps["map-weight"]["z"][1][0] == pytest.approx(0.263, abs=1e-3)  # log2(1.2)
    assert len(maps["map-weight"]["z"]) == len(LINEARS)


def test_experts_of_a_block_are_one_type() -> None:
    report = sample_report()
    for block in report["blocks"]:
        extra = copy.deepcopy(block["linears"][-1])
        block["linears"] += [
            {**extra, "name": f"{block['path']}.mlp.experts.{expert}.down_proj", "output_error": 1e-3 * (expert + 1)}
            for expert in range(3)
        ]
    figures = {figure["name"]: figure for figure in Elements(render_html(report, None, None)).figures()}
    assert [name for name in figures if name.startswith("error")] == [f"error-{index}" for index in range(8)]
    assert figures["error-7"]["data"][2]["y"] == pytest.approx([2e-3] * len(report["blocks"]))  # their mean


def test_names_of_types() -> None:
    assert type_of("model.layers.3.mlp.experts.17.up_proj", "model.layers.3") == "mlp.experts.*.up_proj"
    assert short_names(["a.q_proj", "mlp.up", "mlp.experts.*.up"]) == {
        "a.q_proj": "q_proj", "mlp.up": "mlp.up", "mlp.experts.*.up": "mlp.experts.*.up",
    }  # fmt: skip


needs_browser = pytest.mark.skipif(
    browser_command() is None,
    reason="no browser here: pip install 'awqkit[browser]', or set AWQKIT_BROWSER to a Chromium",
)


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_a_browser_draws_every_plot_and_its_console_stays_empty(whole: str, width: int, scheme: str) -> None:
    seen = open_page(whole, width, scheme)
    assert seen.console == []
    assert seen.probe["loads"] == []
    plots = seen.probe["plots"]
    assert len(plots) == 21
    assert {name: plot for name, plot in plots.items() if plot["marks"] == 0} == {}
    assert plots["plot-saliency"]["marks"] == (4 + 1) * len(LINEARS)  # dots, and the line that joins them
    assert plots["plot-stages"]["marks"] == len(TIMINGS["stages"])
    # No wider than the window, and every plot as wide as its place.
    assert seen.probe["contentWidth"] <= seen.probe["width"]
    assert all(plot["svg"] <= plot["width"] + 1 for plot in plots.values())
    # Ink and paper belong to the theme, and the plots follow when it changes.
    assert seen.probe["background"] == ("rgb(252, 252, 250)" if scheme == "light" else "rgb(20, 23, 26)")
    assert seen.probe["inks"] == ["rgb(95, 102, 109)" if scheme == "light" else "rgb(160, 167, 173)"]
    assert seen.probe["inkAfterChange"] == ["rgb(1, 2, 3)"]


@needs_browser
def test_a_browser_lets_no_page_load_anything(whole: str) -> None:
    tampered = whole.replace("</body>", "<script>fetch('https://example.org/')</script></body>")
    assert "Content Security Policy" in " ".join(open_page(tampered, 800, "light").console)
