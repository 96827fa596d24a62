"""`python -m jobs.report`: one file that a browser shows without asking anybody for anything."""

import json
import re
import shutil
import subprocess

import pytest
import torch

from sepico.embedding import flatten_features
from tests.jobs.training import run_job

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    to = tmp_path_factory.mktemp("report") / "report.html"
    run = str(trained[0])
    options = {"run": run, "to": str(to), "images": "2", "embedding": "tsne"}
    job = run_job("jobs.report", options)
    assert job.returncode == 0, job.stderr
    return to


@pytest.mark.slow
def test_the_report_holds_its_pictures_and_asks_for_nothing(page):
    text = page.read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Runs", "IoU per class on the target", "Curves", "Images of the target", "Embedding map",
        "first",
    ]  # fmt: skip
    assert all(source.startswith("data:image/") for source in re.findall(r'src="(.{11})', text))
    assert text.count("<img ") == 4
    assert not re.search(r"<(script|link|iframe)|url\(|@import", text)


@pytest.mark.slow
def test_the_report_says_what_was_run_on_what(page):
    text = page.read_text()
    for part in ("distcl", "worker hours", "torch 2.", "Configuration", "tu-test_efficientnet"):
        assert part in text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_every_picture_and_opens_no_connection(page, tmp_path):
    copy = tmp_path / "report.html"
    probe = (
        "<script>addEventListener('load', () => { document.title = ["
        "...[...document.images].map(image => image.naturalWidth), "
        "...performance.getEntriesByType('resource').map(entry => entry.name)].join(' ') })"
        "</script>"
    )
    copy.write_text(page.read_text().replace("</body>", f"{probe}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    shown = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={tmp_path}/profile", copy.as_uri()],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    found = re.search(r"<title>(.*?)</title>", shown)[1].split()
    assert [word for word in found if not word.isdigit()] == []  # what it asked the network for
    assert len(found) == 4 and all(int(width) > 300 for width in found)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_pixels_of_one_class_lie_together(method):
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(5, 16, generator=generator)
    classes = torch.arange(5).repeat(20)
    features = centres[classes] + 0.3 * torch.randn(100, 16, generator=generator)
    places = flatten_features(features, method)
    assert places.shape == (100, 2) and places.abs().max() <= 1
    nearest = torch.cdist(places, places).fill_diagonal_(torch.inf).argmin(1)
    assert (classes[nearest] == classes).float().mean() > 0.9


def test_a_run_must_be_named(tmp_path):
    job = run_job("jobs.report", {"to": str(tmp_path / "report.html")})
    assert job.returncode == 2
    assert json.dumps(job.stderr).count("error: run is not set") == 1
