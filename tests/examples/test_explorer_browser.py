"""The explorer in a browser without a window: it draws without an error, loads nothing, can be moved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import explorer
from lab.explorer import read_exploration, write_page

pytest.importorskip("plotly", reason="pip install 'etflayers[examples]'")
pytestmark = pytest.mark.slow

DESKTOP, PHONE = (1280, 800, False), (390, 844, True)
PATIENCE = 120  # seconds: the picture is drawn by software, on a machine that has other things to do


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    return write_page(path, [read_exploration(file) for file in explorer.DEMO])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install 'etflayers[dev]'")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # WebGL without a graphics card; Chromium's sandbox refuses to start for root, as in a container.
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "enable-unsafe-swiftshader"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    window.set_page_load_timeout(PATIENCE)
    window.set_script_timeout(PATIENCE)
    yield window
    window.quit()


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def opened(request: pytest.FixtureRequest, browser: Any, page: Path) -> Any:
    width, height, mobile = request.param
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    until(browser, lambda: "Epoch 0 of" in text_of(browser, "now"))
    return browser


def until(browser: Any, holds: Callable[[], bool]) -> None:
    ui = pytest.importorskip("selenium.webdriver.support.ui")
    ui.WebDriverWait(browser, PATIENCE).until(lambda _: holds())


def text_of(browser: Any, name: str) -> str:
    return browser.find_element("id", name).text


def shown(browser: Any, trace: int) -> list[float]:
    """The points that Plotly has of a trace in space, as the file has them."""
    script = """
        const trace = document.getElementById("space").data[arguments[0]];
        const thousandths = (value) => Math.round(1000 * value);
        return trace.x.flatMap((x, i) => [x, trace.y[i], trace.z[i]].map(thousandths));
    """
    return browser.execute_script(script, trace)


def marker(browser: Any, curve: str) -> tuple[float, float]:
    script = "const t = document.getElementById(arguments[0]).data.at(-1); return [t.x[0], t.y[0]];"
    return tuple(browser.execute_script(script, curve))


def errors(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_page_loads_draws_and_asks_nobody(opened: Any, page: Path) -> None:
    asked = set()
    for entry in opened.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    # What a page makes of its own memory has an address too.
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} <= {page.as_uri()}
    assert errors(opened) == []
    # Plotly has drawn in space and on the curves, and nothing is wider than the window.
    assert opened.execute_script("return document.querySelectorAll('#space canvas').length") > 0
    assert opened.execute_script("return document.querySelectorAll('#curves .main-svg').length") >= 3
    overhang = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert opened.execute_script(overhang) <= 0
    pixels = opened.execute_script("""
        return Plotly.toImage("space", {format: "png", width: 400, height: 300}).then((url) => url.length)
    """)
    assert pixels > 5000  # of a white picture: under 2000


def test_keys_move_the_slider_and_the_slider_everything(opened: Any) -> None:
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    first = read_exploration(explorer.DEMO[0])
    run = first["runs"][0]
    slider = opened.find_element("id", "epoch")
    assert shown(opened, 5) == run["frames"][0]["means"]
    for press, number in ((keys.ARROW_RIGHT, 1), (keys.END, len(run["epochs"]) - 1), (keys.ARROW_LEFT, -2)):
        slider.send_keys(press)
        epoch = run["epochs"][number]
        until(opened, lambda epoch=epoch: f"Epoch {epoch} of" in text_of(opened, "now"))
        assert slider.get_attribute("aria-valuetext") == f"epoch {epoch}"
        for trace, name in ((2, "features"), (4, "frame"), (5, "means")):
            assert shown(opened, trace) == run["frames"][number][name]
        distance = run["frames"][number]["distances"][0]
        text = opened.execute_script("return document.getElementById('space').data[5].hovertext[0]")
        assert text.startswith(
            f"mean of {first['classes'][0]}<br>distance from its corner {float(f'{distance:.2g}'):g}"
        )
        for curve in ("nc1", "nc2", "nc3"):
            assert marker(opened, curve) == pytest.approx((epoch, run["measures"][curve][number]))
    assert errors(opened) == []


def test_play_goes_to_the_end(opened: Any) -> None:
    play = opened.find_element("id", "play")
    last = read_exploration(explorer.DEMO[0])["runs"][0]["epochs"][-1]
    play.click()
    assert play.text == "Pause"
    until(opened, lambda: f"Epoch {last} of" in text_of(opened, "now"))
    until(opened, lambda: play.text == "Play")
    assert errors(opened) == []


def test_choice_of_head_and_training(opened: Any) -> None:
    four, ten = (read_exploration(file) for file in explorer.DEMO)
    assert "exact" in text_of(opened, "exact")
    names = [label.text for label in opened.find_elements("css selector", "#heads label")]
    assert names == [run["head"] for run in four["runs"]]
    opened.find_element("css selector", "#heads input[value=nearest]").click()
    nearest = next(run for run in four["runs"] if run["head"] == "nearest")
    until(opened, lambda: shown(opened, 5) == nearest["frames"][0]["means"])
    opened.find_element("css selector", "#training option:last-child").click()
    nearest = next(run for run in ten["runs"] if run["head"] == "nearest")
    until(opened, lambda: shown(opened, 5) == nearest["frames"][0]["means"])
    assert "10 class means, less their average, span 9 dimensions, and it shows 3" in text_of(opened, "exact")
    share = nearest["frames"][0]["shares"][0]
    said = opened.find_element("css selector", "#shares dd").text
    assert float(said.rstrip("%")) == pytest.approx(100 * share, abs=0.5)
    assert errors(opened) == []


def test_what_is_switched_off_is_not_drawn(opened: Any) -> None:
    visible = "return document.getElementById('space').data.map((trace) => trace.visible)"
    box = opened.find_element("css selector", "#layers input[value=frame]")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    box.click()
    until(opened, lambda: opened.execute_script(visible) == [True, True, True, False, False, True])
    opened.find_element("css selector", "#heads input[value=learned]").click()
    until(opened, lambda: opened.execute_script(visible) == [True, True, True, False, False, True])
    assert errors(opened) == []
