"""Several runs on one page, and both pages in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ardlora_ext.commands import cli
from ardlora_ext.errors import InputError
from ardlora_ext.file_set import write_set
from ardlora_ext.report.page import write_report
from ardlora_ext.report.run_files import run_files
from ardlora_ext.report.several import comparison

from helpers.run_files import metrics_of, ranks_of, record

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two saved runs."""
    flat = ranks_of(4, 4)
    lora = metrics_of(
        method="lora",
        seed=1,
        metric_after=0.8125,
        ranks=flat,
        rank_history=[{"step": 0, "params": 20000, "ranks": flat}],
    )
    folders = [tmp_path / "ard", tmp_path / "lora"]
    for folder, metrics, records in zip(folders, (metrics_of(), lora), ([record(10), record(20)], []), strict=True):
        folder.mkdir()
        write_set(folder, run_files(metrics, records))
    return folders


def test_says_what_differs_and_who_won(runs: list[Path], tmp_path: Path) -> None:
    page = comparison.write_comparison(runs, tmp_path / "page.html").read_text()
    assert "they differ in method, seed" in page
    assert '<th class="num">accuracy</th>' in page
    assert re.search(r"<td>ard</td>.*87\.5%.*5\.00 \(1 to 9\)</td><td class=\"num\">2<", page, re.S)
    assert re.search(r"<td>lora</td>.*81\.2%.*4\.00 \(4 to 4\)</td><td class=\"num\">0<", page, re.S)
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_command_line(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["report", *map(str, runs)])
    assert capsys.readouterr().out.split() == ["comparison.html"]
    assert (tmp_path / "comparison.html").exists()


def test_refuses_the_same_run_twice_and_what_is_none(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be different runs"):
        comparison.write_comparison([runs[0], runs[1].parent / "." / "ard"])
    with pytest.raises(InputError, match=r"must hold metrics\.json"):
        comparison.write_comparison([runs[0], tmp_path])


def test_runs_of_the_same_folder_name_keep_their_paths(runs: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "again" / "ard"
    shutil.copytree(runs[0], other)
    page = comparison.write_comparison([runs[0], other], tmp_path / "page.html").read_text()
    assert str(other) in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_pages_in_a_browser(runs: list[Path], tmp_path: Path) -> None:
    pages = {
        write_report(runs[0]): ("Where the rank went", "Rank decisions"),
        comparison.write_comparison(runs, tmp_path / "comparison.html"): ("Results", "Parameters and ranks"),
    }
    probe = (
        "<script>addEventListener('load', () => { const images = [...document.images];"
        "document.title = images.filter(i => i.complete && i.naturalWidth > 500).length + ' of ' + images.length"
        " + (document.documentElement.scrollWidth > document.documentElement.clientWidth ? ', too wide' : '');"
        "});</script></body>"
    )
    for page, headings in pages.items():
        probed = tmp_path / f"probed-{page.name}"
        probed.write_text(page.read_text().replace("</body>", probe))
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1280,2000",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        command = [str(CHROMIUM), *options, "--virtual-time-budget=5000", "--dump-dom", probed.as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except subprocess.TimeoutExpired:
            pytest.skip("Chromium does not come to an end here")
        images = page.read_text().count("<img ")
        assert f"<title>{images} of {images}</title>" in done.stdout
        assert all(f"<h2>{heading}</h2>" in done.stdout for heading in headings)
        assert "Uncaught" not in done.stderr
