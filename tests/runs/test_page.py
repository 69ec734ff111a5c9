"""``moefoundry report``: one HTML file, of whole and of broken runs, without network, script and secrets."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moefoundry.cli.main import main
from moefoundry.runs.report import report_page
from moefoundry.runs.series import Load, series_of
from moefoundry.runs.svg import SHARP, joined, load_plot
from tests.runs.writing import END, START, line_of, write_run

PLOTS = {
    *("Loss", "Loss by source", "Other terms of the loss", "Throughput", "Expert load", "Violation of balance"),
    *("Router entropy", "Gradient norm", "Learning rate", "Memory", "Waits", "Tasks"),
}
VOID = {"meta", "br", "img", "input", "link"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Elements of a page; closes what it opens, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def plots(self) -> list[str]:
        return [str(attributes["aria-label"]) for tag, attributes in self.elements if tag == "svg"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    origins = {"origins": {"optimizer.lr": "override", "model.d_model": "base.yaml"}, "versions": {"torch": "2.14.1"}}
    history = [START | origins, END | {"batch": 8, "state": "failed", "reason": "ValueError: <b>bad</b>"}]
    history += [START | origins | {"batch": 5, "from": "runs/a/checkpoints/ba5"}, END]
    return write_run(tmp_path_factory.mktemp("page") / "one", history=history)


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return report_page([run])


def test_a_page_has_every_plot_and_loads_nothing(text: str) -> None:
    page = Page(text)
    assert set(page.plots()) == PLOTS
    names = [tag for tag, _ in page.elements]
    assert not {"script", "link", "iframe", "object", "base"} & set(names)
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:image/png;base64,")), (tag, attributes)
    assert not re.search(r"@import|url\((?!#)", text)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "<b>bad</b>" not in text
    assert "ValueError: <b>bad</b>" in page.texts


def test_a_page_fits_phones_and_both_schemes(text: str) -> None:
    page = Page(text)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    assert "prefers-color-scheme: dark" in text
    drawn = text[text.index("<svg") :]
    assert "#000000" not in drawn, "black on black"
    assert "currentColor" in drawn
    widths = [float(str(each["width"]).removesuffix("pt")) for tag, each in page.elements if tag == "svg"]
    assert max(widths) <= 300
    assert all(each["viewbox"] for tag, each in page.elements if tag == "svg")


def test_a_page_tells_of_recipe_history_and_evaluation(text: str) -> None:
    texts = Page(text).texts
    for expected in ("override", "base.yaml", "torch", "2.14.1", "from runs/a/checkpoints/ba5, 2 ranks on ?", "failed"):
        assert expected in texts
    assert "3.5000 nats/token; lowest 3.0000, at batch 15" in texts
    assert "arithmetic/0-shot/accuracy" in texts


def test_several_runs_are_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_run(tmp_path / "two", "optimizer.lr=0.5", batches=7, history=[START])
    output = tmp_path / "new" / "both.html"
    assert main(["report", str(run), str(other), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    page = Page(output.read_text())
    assert set(page.plots()) == PLOTS | {"Training loss", "Held-out loss"}
    assert page.plots().count("Throughput") == 3
    assert {"optimizer.lr", "0.5", "0.01", "stale", "one", "two"} <= set(page.texts)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_broken_runs_get_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = write_run(tmp_path / "broken", history=[START, END | {"state": "failed", "reason": "NonFiniteError"}])
    (broken / "config.yaml").write_text("a: [")
    lines = [line_of(1), line_of(2) | {"loss/train/lm": math.nan, "moe/load/layer1": ["x"], "grad_norm": "y"}]
    (broken / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"batch"')
    assert main(["report", str(broken)]) == 0
    page = Page((broken / "report.html").read_text())
    assert "loss/train/lm" in page.texts, "among what is not finite"
    assert any(text.startswith("config.yaml: while parsing") for text in page.texts)
    assert set(page.plots()) >= {"Loss", "Expert load"}
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    assert main(["report", str(empty)]) == 0
    assert "No batch has ended." in Page((empty / "report.html").read_text()).texts
    capsys.readouterr()
    (tmp_path / "none").mkdir()
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "none: no run: it has neither config.yaml nor metrics.jsonl" in capsys.readouterr().err


def test_a_page_has_no_secrets(tmp_path: Path) -> None:
    token, password = "hf_" + "abcdefghijKLMNOPQRST1234567890abcd", "correct-horse"
    place = f"s3://me:{password}@host/{token}"
    event = {"command": f"train --key {token}", "from": place, "origins": {"seed": place}}
    run = write_run(tmp_path / "run", history=[START | event, END | {"state": "failed", "reason": place}])
    config = run / "config.yaml"
    config.write_text(config.read_text() + f"loggers: {{wandb: {{api_key: {password}, group: {token}}}}}\n")
    text = report_page([run]) + report_page([run, write_run(tmp_path / "other", batches=0)])
    assert token not in text
    assert password not in text
    assert text.count("(secret)") >= 4


def test_long_runs_have_bins_that_lose_no_spike() -> None:
    lines = [{"batch": batch, "x": 5.0 if batch == 777 else 1.0} for batch in range(1, 4001)]
    curve = series_of(lines, 4000).curves["x"]
    assert len(curve.means) == 400
    assert max(curve.highs) == 5.0
    assert max(curve.means) == 1.4
    assert curve.batches[0] == 5.5
    short = series_of(lines[:300], 300).curves["x"]
    assert short.batches == list(range(1, 301))
    assert short.means == short.lows == short.highs


def test_loads_of_thousands_of_experts_are_one_image_without_gaps() -> None:
    loads = {f"layer{layer}": Load([1, 2, 3], [[1.0] * 128, [2.0] * 128, [0.0] * 128]) for layer in range(20)}
    drawn = load_plot("many", loads)
    assert drawn.count("<image") == 2, "one is the color bar"
    assert SHARP not in drawn
    assert SHARP in load_plot("few", {"layer0": loads["layer0"]})
    assert joined(loads["layer0"], 2) == [[1.5] * 128, [0.0] * 128]


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome, and none is on this machine")
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_browser_shows_the_page_at_the_width_of_a_phone(text: str, tmp_path: Path, scheme: str) -> None:
    (tmp_path / "frame.html").write_text(
        f'<iframe id="f" style="width: 360px; height: 9000px" srcdoc="{escape(text)}"></iframe><pre id="r"></pre>'
        """<script>onload = () => {
            const page = document.getElementById("f").contentDocument
            const plots = [...page.querySelectorAll("svg")].map(each => each.getBoundingClientRect())
            document.getElementById("r").textContent = JSON.stringify({
                width: page.documentElement.scrollWidth, plots: plots.filter(each => each.width > 250).length,
                paper: getComputedStyle(page.body).backgroundColor, ink: getComputedStyle(page.body).color })
        }</script>"""
    )
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}/profile", f"--blink-settings=preferredColorScheme={int(scheme != 'dark')}"]
    done = subprocess.run([*command, f"file://{tmp_path}/frame.html"], capture_output=True, text=True, env=os.environ)
    assert "CONSOLE" not in done.stderr
    found = re.search(r'<pre id="r">(.*?)</pre>', done.stdout)
    assert found, done.stderr
    result = json.loads(found[1])
    assert result["width"] <= 360
    assert result["plots"] == len(PLOTS)
    dark, light = "rgb(20, 23, 26)", "rgb(255, 255, 255)"
    assert result["paper"] == (dark if scheme == "dark" else light)
