"""The report's page in a real browser, at the width of a desktop and of a phone, by keyboard, in light and dark."""

import shutil

import pytest

from ofb.cli import main

selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install 'ofb-kernels[test]'")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no chromium and chromedriver are installed; on Debian: apt-get install chromium chromium-driver",
)

RUN = (
    "search --model vit_tiny_patch16_224 --model-kwargs embed_dim=32 depth=2 num_heads=2 --device cpu --batch-size 128 "
    "--epochs 4 --finetune-epochs 1 --mask-ratio-start 0.05 --mask-ratio-end 0.25 --lr 1e-3"
)
WIDTHS = {"desktop": 1280, "phone": 375}
LEAST_FONT = 9  # pixels, of the words in a chart
LEAST_CONTRAST = 4.5  # WCAG 2.2, level AA

# Each chart's number of marks that take up room, and the words that stick out of it.
CHARTS = """
return [...document.querySelectorAll("svg.chart")].map(svg => {
  for (let box = svg.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
  const frame = svg.getBoundingClientRect();
  const inside = r => r.left >= frame.left - 1 && r.right <= frame.right + 1
                   && r.top >= frame.top - 1 && r.bottom <= frame.bottom + 1;
  const marks = [...svg.querySelectorAll(".marks > *")].map(mark => mark.getBoundingClientRect());
  const words = [...svg.querySelectorAll("text")];
  return {
    label: svg.getAttribute("aria-label"), role: svg.getAttribute("role"), left: frame.left, right: frame.right,
    marks: marks.filter(r => r.width + r.height > 0 && inside(r)).length, outside: marks.filter(r => !inside(r)).length,
    clipped: words.filter(word => !inside(word.getBoundingClientRect())).map(word => word.textContent),
    font: 11 * frame.width / 360,
  };
});
"""

# Contrast of ink and quiet text against the page, by WCAG's formula.
CONTRASTS = """
const luminance = color => {
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const [r, g, b] = color.match(/[\\d.]+/g).map(v => linear(v / 255));
  return .2126 * r + .7152 * g + .0722 * b;
};
const style = (selector, key) => getComputedStyle(document.querySelector(selector))[key];
const pairs = [
  ["body", "body"], ["section p", "body"], ["nav a", "body"], ["figcaption", "figure"], [".chart text", "figure"]
];
return pairs.map(([text, ground]) => {
  const ink = luminance(style(text, text == ".chart text" ? "fill" : "color"));
  const paper = luminance(style(ground, "backgroundColor"));
  return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
});
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """Of the page of a real run."""
    folder = tmp_path_factory.mktemp("runs") / "search"
    assert main([*RUN.split(), "--output", str(folder)]) == 0
    return (folder / "report" / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def visit(browser, address: str, width: int, scheme: str = "light") -> None:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    browser.get(address)


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_it_renders(browser, address, width):
    visit(browser, address, width)
    charts = browser.execute_script(CHARTS)
    assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [
        width,
        True,
    ]
    assert len(charts) > 25
    for chart in charts:
        assert chart["role"] == "img" and len(chart["label"]) > 10
        assert chart["marks"] > 0 and chart["outside"] == 0 and chart["clipped"] == [], chart
        assert 0 <= chart["left"] < chart["right"] <= width and chart["font"] >= LEAST_FONT, chart
    assert browser.get_log("browser") == []
    assert (
        browser.execute_script(
            "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))"
        )
        == []
    )


def test_pictures_have_words_and_are_there(browser, address):
    visit(browser, address, WIDTHS["desktop"])
    pictures = browser.execute_script(
        "return [...document.images].map(i => [i.complete && i.naturalWidth > 0, i.alt.length > 20])"
    )
    assert pictures == [[True, True]]


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_the_keyboard_reaches_everything_that_acts(browser, address, width):
    visit(browser, address, width)
    acting = "a[href], summary, [tabindex='0']"
    shown = f"return [...document.querySelectorAll(`{acting}`)].filter(e => e.checkVisibility())"
    expected = browser.execute_script(f"{shown}.length")
    body, reached = browser.find_element(By.TAG_NAME, "body"), []
    for _ in range(expected):
        browser.switch_to.active_element.send_keys(Keys.TAB) if reached else body.send_keys(Keys.TAB)
        reached.append(browser.switch_to.active_element)
        outline = browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", reached[-1])
        assert outline != "none", reached[-1].tag_name
    assert len({element.id for element in reached}) == expected > 20
    assert {element.tag_name for element in reached} == {"a", "summary", "div"}
    browser.execute_script("arguments[0].focus()", folded := browser.find_element(By.CSS_SELECTOR, "#options summary"))
    folded.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.querySelector('#options details').open")


def test_light_and_dark(browser, address):
    papers = set()
    for scheme in ("light", "dark"):
        visit(browser, address, WIDTHS["desktop"], scheme)
        papers.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
        assert min(browser.execute_script(CONTRASTS)) >= LEAST_CONTRAST, scheme
    assert len(papers) == 2
