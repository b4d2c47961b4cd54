"""Figures and reports: what they show, that pages stand alone, and what goes wrong."""

import os
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

from geotucker_torch import TuckerLinear, plot, report, spectra
from geotucker_torch._views import _report

from .cases import training

NASTY = "a<script>alert(1)</script>&\"'$x$"
_VOID = {"meta"}


class Page(HTMLParser):
    """A page whose elements are properly nested."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(source, path, **options):
    report(source, path, **options)
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained():
    return training(steps=3)[0]


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    return page_of(trained, tmp_path_factory.mktemp("page") / "report.html", title="A & B")


def test_a_page_needs_nothing_but_itself(page):
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "img"}
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name == "xmlns":
                continue
            assert "http" not in (value or "")
            if name in ("href", "src"):
                assert value.startswith(("#", "data:"))


def test_ids_are_unique_and_links_lead_somewhere(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = [a["href"][1:] for _, a in page.elements if a.get("href", "").startswith("#")]
    clips = [
        a["clip-path"].removeprefix("url(#").removesuffix(")")
        for _, a in page.elements
        if "clip-path" in a
    ]
    assert links
    assert clips
    assert set(links + clips) <= set(ids)


def test_every_picture_says_what_it_shows_and_has_numbers(page, trained):
    pictures = page.all("svg")
    assert len(pictures) == 2 + 3 * len(trained.ranks)
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 10
    assert len(page.all("table")) == 1 + (1 + 3) * len(trained.ranks)
    assert not any("000000" in str(attributes) for _, attributes in page.elements)  # dark pages


def test_a_page_says_what_was_measured(page, trained):
    measured = spectra(trained)
    assert page.text.count("A & B") == 2
    for number in (measured.parameters, measured.dense_parameters):
        assert f"{number:,}" in page.text
    for weight in measured.tucker:
        for ranks in (weight.history[0], weight.ranks, weight.ranks_for(0.99)):
            assert "x".join(map(str, ranks)) in page.text
        for values in weight.values:
            assert f"{values[0]:.4g}" in page.text
        assert f"{100 * weight.flops / weight.dense_flops:.1f} %" in page.text


def test_names_are_escaped(tmp_path):
    model = nn.Module()
    model.add_module(NASTY, TuckerLinear(30, 20, ranks=3))
    found = page_of(model, tmp_path / "report.html", title=NASTY)
    assert found.all("script") == []
    assert found.text.count(NASTY) >= 4
    assert any(NASTY in attributes["aria-label"] for attributes in found.all("svg"))
    plot(model).draw_without_rendering()
    assert NASTY in plot(model, NASTY).get_suptitle()


def test_without_an_optimizer_there_is_no_time(tmp_path, trained):
    found = page_of(trained.model, tmp_path / "report.html")
    assert len(found.all("svg")) == 1 + 2 * len(trained.ranks)
    assert "over time" not in found.text


def test_of_many_weights_the_largest_have_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(_report, "_PICTURES", 2)
    monkeypatch.setattr(_report, "_OPEN", 3)
    model = nn.Sequential(*(TuckerLinear(n, n, ranks=2) for n in (9, 30, 8, 20)))
    found = page_of(model, tmp_path / "report.html")
    assert len(found.all("svg")) == 1 + 2 * 2
    drawn = {a["aria-label"][0] for a in found.all("svg")[1:]}
    assert drawn == {"1", "3"}
    assert "of the 2 largest weights only" in found.text
    assert not any("open" in attributes for attributes in found.all("details"))


def test_pages_are_the_same_in_any_style(tmp_path, trained):
    report(trained, tmp_path / "plain.html")
    before = {name: matplotlib.rcParams[name] for name in ("font.size", "svg.fonttype")}
    with matplotlib.style.context("dark_background"):
        report(trained, tmp_path / "dark.html")
    assert before == {name: matplotlib.rcParams[name] for name in before}
    assert (tmp_path / "plain.html").read_bytes() == (tmp_path / "dark.html").read_bytes()


def test_amid_a_step_the_page_is_that_from_before(tmp_path):
    optimizer, backward = training()
    report(optimizer, tmp_path / "before.html")
    backward()
    report(optimizer, tmp_path / "amid.html")
    assert (tmp_path / "before.html").read_bytes() == (tmp_path / "amid.html").read_bytes()


@pytest.mark.parametrize("core", [0.0, 1.0, 1e-30])
def test_extreme_weights_are_drawn(tmp_path, core):
    layer = TuckerLinear(200, 300, ranks=1 if core else 150)
    nn.init.constant_(layer.core, core)
    found = page_of(layer, tmp_path / "report.html")
    assert "(the model)" in found.text
    assert "nan" not in found.text


def test_small_singular_values_do_not_stretch_the_axis():
    layer = TuckerLinear(200, 300, ranks=150)
    with torch.no_grad():
        layer.core.copy_(torch.diag(torch.logspace(0, -20, 150)))
    axes = plot(layer, "").axes[0]
    assert axes.get_yscale() == "log"
    assert 1e-9 < axes.get_ylim()[0] < 1e-7


def test_figures_show_the_numbers(trained):
    weight = next(weight for weight in spectra(trained).tucker if weight.name == "3")
    values, energy, ranks = plot(trained, "3").axes
    for mode in range(2):
        assert np.allclose(values.lines[mode].get_ydata(), weight.values[mode])
        assert np.allclose(energy.lines[mode].get_ydata(), 100 * np.array(weight.energy(mode)))
        assert list(ranks.lines[mode].get_xdata()) == list(weight.history)
        assert list(ranks.lines[mode].get_ydata()) == [r[mode] for r in weight.history.values()]
    assert f"out {weight.ranks[0]} of 16" in ranks.get_legend_handles_labels()[1]


def test_the_overview_shows_sizes_and_ranks_over_time(trained):
    sizes, over_time, *_ = plot(trained).axes
    weights = spectra(trained).weights
    bars = [patch.get_width() for patch in sizes.patches]
    assert bars == [w.dense_parameters for w in weights] + [w.parameters for w in weights]
    rows = over_time.images[0].get_array()
    history = trained.rank_history["3"]
    assert np.allclose(rows[3], [ranks[1] / 72 for ranks in history.values()])
    assert len(plot(trained.model).axes) == 1


def test_what_cannot_be_drawn_is_named(tmp_path, trained):
    with pytest.raises(ValueError, match="name: expected one of '0', '3', got '4'"):
        plot(trained, "4")  # it is dense
    path = tmp_path / "report.html"
    path.write_text("old")
    for source, error in ((nn.ReLU(), ValueError), (None, TypeError)):
        with pytest.raises(error, match="source: expected a"):
            plot(source)
        with pytest.raises(error, match="source: expected a"):
            report(source, path)
    assert path.read_text() == "old"
    with pytest.raises(FileNotFoundError):
        report(TuckerLinear(9, 9), tmp_path / "nowhere" / "report.html")


def test_without_matplotlib_all_but_pictures_works(tmp_path):
    code = """
import sys
sys.modules["matplotlib"] = None
from geotucker_torch import TuckerLinear, plot, report, summary
layer = TuckerLinear(9, 9, ranks=2)
assert "TuckerLinear" in summary(layer)
for call in (lambda: plot(layer), lambda: plot(layer, ""), lambda: report(layer, sys.argv[1])):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "report.html")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for function, line in zip(("plot", "plot", "report"), lines, strict=True):
        assert line.startswith(f"{function}: needs the package matplotlib")
        assert "geotucker[report]" in line
    assert not (tmp_path / "report.html").exists()
