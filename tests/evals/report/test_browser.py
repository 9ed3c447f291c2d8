"""The page in a real browser, from disk. Needs Chromium, its driver, and selenium; skipped, by name, without them."""

import base64
import io
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from cal_train.evals.report.page import PageContent, ScoredModel, write_page
from cal_train.evals.report.scores import ScoredRow
from cal_train.evals.sight.values import SampleSight, View
from cal_train.types import Message, Sample

pytestmark = pytest.mark.slow

HOSTILE = (
    '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">'
    "<svg onload='window.hacked = 3'>\u202eevil {{constructor}}"
)

MINUS = "\u2212"


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("NO BROWSER: apt-get install chromium chromium-driver to test the page")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,1200"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def row(id, tokens, rng):
    delta = rng.normal(2, 2, len(tokens)).astype(np.float32)
    return ScoredRow(
        id, tuple(tokens), np.arange(len(tokens)) + 3, 10 + delta, 10 + 0 * delta, delta, delta.clip(1, 5), 99
    )


def thumbnail():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def open_page(browser, tmp_path, models, samples=(), thumbnails=None):
    content = PageContent(
        "A page", models, 1.0, 5.0, list(samples), thumbnails or {}, {"loss": {"run": [(1, 2.0), (2, 1.0)]}}, []
    )
    page = write_page(content, tmp_path / "page.html")
    browser.get_log("browser")
    browser.get(page.as_uri())
    wait_for_samples(browser)
    return page


def wait_for_samples(browser):
    for _ in range(100):  # the driver may return before a large page has run its script
        if find(browser, "#count") and find(browser, "#count")[0].text:
            return
        time.sleep(0.1)
    raise AssertionError(f"the page drew nothing in 10 s; log: {browser.get_log('browser')}")


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def test_a_pair_shows_its_tokens_values_and_picture_by_mouse_and_by_keyboard(browser, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    rng = np.random.default_rng(0)
    tokens = [" a", " red", " fox", ".", "</s>"]
    models = [ScoredModel(name, [row("s1", tokens, rng), row("s2", tokens[1:], rng)]) for name in ("baseline", "cal")]
    image = tmp_path / "x.png"
    sample = Sample("s1", "f", 0, (Message("user", "<image>\nwhat?"),), (image,))
    open_page(browser, tmp_path, models, [sample, None], {image: thumbnail()})
    assert len(find(browser, ".answer .tok")) == 2 * (5 + 4)
    assert [token.text for token in find(browser, ".answer")[0].find_elements("css selector", ".tok")] == tokens
    assert browser.execute_script("return document.querySelector('.sample img').naturalWidth") == 64

    def reading():
        (element,) = find(browser, "#reading")
        return element.text if element.is_displayed() else None

    def expected(i, k):
        rows = [model.rows[i] for model in models]
        return [
            f"with image {rows[0].logit_with[k]:.2f} {rows[1].logit_with[k]:.2f}",
            f"delta {rows[0].delta[k]:+.2f} {rows[1].delta[k]:+.2f}".replace("-", MINUS),
            f"weight {rows[0].weight[k]:.2f} {rows[1].weight[k]:.2f}",
        ]

    ActionChains(browser).move_to_element(find(browser, ".answer .tok")[2]).perform()
    assert reading().startswith("fox") and all(line in reading() for line in expected(0, 2))
    ActionChains(browser).move_to_element(find(browser, "h1")[0]).perform()
    assert reading() is None

    find(browser, "#numbers")[0].send_keys(Keys.TAB)  # from the last control into the first answer
    assert reading().startswith("a\n")
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert reading().startswith("red") and all(line in reading() for line in expected(0, 1))
    browser.switch_to.active_element.send_keys(Keys.END)
    assert reading().startswith("</s>")
    browser.switch_to.active_element.send_keys(Keys.TAB, Keys.TAB)  # one stop per answer: past cal's, into s2
    assert reading().startswith("red") and all(line in reading() for line in expected(1, 0))
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert reading() is None
    label = browser.switch_to.active_element.get_attribute("aria-label")
    assert label.startswith(f"red, delta {models[0].rows[1].delta[0]:+.2f}".replace("-", MINUS)) and "weight" in label
    assert browser.get_log("browser") == []


def test_a_hostile_caption_is_text_and_nothing_else(browser, tmp_path):
    sample = Sample(HOSTILE, "f", 0, (Message("user", HOSTILE),))
    models = [ScoredModel(HOSTILE, [row(HOSTILE, [" a", HOSTILE], np.random.default_rng(0))])]
    open_page(browser, tmp_path, models, [sample])
    find(browser, ".answer .tok")[1].click()
    time.sleep(0.5)
    assert browser.execute_script("return window.hacked") is None
    assert find(browser, "img[src='x']") == [] and len(find(browser, "script")) == 3
    assert find(browser, ".answer .tok")[1].text == HOSTILE.replace("\u202e", "[U+202E]")
    assert browser.get_log("browser") == []  # a violated policy would be logged


def test_the_policy_would_stop_a_script_that_got_in(browser, tmp_path):
    models = [ScoredModel("m", [row("a", [" a", " b"], np.random.default_rng(0))])]
    page = open_page(browser, tmp_path, models)
    text = page.read_text().replace(
        "</main>", '<img src="x" onerror="window.hacked = 1"><script>window.hacked = 2</script></main>'
    )
    page.write_text(text)
    browser.get(page.as_uri())
    time.sleep(0.3)
    assert browser.execute_script("return window.hacked") is None
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_maps_follow_the_token_and_nearest_words_lie_over_their_patches(browser, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    rng = np.random.default_rng(0)
    tokens = [" a", " red", " fox"]
    models = [ScoredModel(name, [row("s1", tokens, rng), row("s2", tokens, rng)]) for name in ("baseline", "cal")]
    sights = []
    for turn in (0, 1):  # three tokens, a 2 x 3 grid whose last patch is no token; the second model looks the other way
        attention = np.full((3, 5), 0.01, np.float32)
        for k, strongest in enumerate([(0, 1), (1, 4), (4, 0)]):
            attention[k, strongest[turn]] = 0.2
        view = View(0, "whole", np.full((20, 30, 3), 200, np.uint8), np.array([[0, 1, 2], [3, 4, -1]]))
        words = (" sky", HOSTILE, "<0x0A>", " fox", "\n")
        sights.append(SampleSight([view], attention, words, np.linspace(0.1, 0.5, 5, dtype=np.float32)))
    content = PageContent("A page", models, 1.0, 5.0, [], {}, {}, [], maps={1: sights})
    browser.get(write_page(content, tmp_path / "page.html").as_uri())
    wait_for_samples(browser)
    first, second = find(browser, ".sample")
    assert first.find_elements("css selector", ".maps") == [] and len(find(browser, ".maps canvas")) == 2

    def hottest():
        """For each canvas, the (column, row) that is reddest, as painted, and whether the last patch is untouched."""
        return browser.execute_script("""
            return [...document.querySelectorAll(".views canvas")].map((canvas) => {
              const pixels = canvas.getContext("2d").getImageData(0, 0, 3, 2).data;
              const red = [0, 1, 2, 3, 4].map((i) => pixels[4 * i] * pixels[4 * i + 3]);
              const best = red.indexOf(Math.max(...red));
              return [best % 3, Math.floor(best / 3), pixels[4 * 5 + 3]];
            });
        """)

    answers = second.find_elements("css selector", ".answer")
    ActionChains(browser).move_to_element(answers[0].find_elements("css selector", ".tok")[1]).perform()
    assert hottest() == [[1, 0, 0], [1, 1, 0]]  # image tokens 1 and 4
    looked = [element.text for element in find(browser, ".looked")]
    assert looked == ["red: 24 % of its attention on the image, 20 % on the strongest patch"] * 2
    browser.execute_script("arguments[0].focus()", answers[1].find_elements("css selector", ".tok")[0])
    browser.switch_to.active_element.send_keys(Keys.END)
    assert hottest() == [[1, 1, 0], [0, 0, 0]]  # fox: 4 and 0
    assert "row 2 of 2, column 2 of 3" in find(browser, ".views canvas")[0].get_attribute("aria-label")

    summary = find(browser, ".nearest summary")[0]
    assert "40 % of 5" in summary.text  # sky and fox; 2 of 5
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    browser.execute_script("arguments[0].focus()", summary)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    time.sleep(0.3)
    cells = find(browser, ".nearest")[0].find_elements("css selector", ".words span")
    shown = [cell.get_attribute("textContent") for cell in cells]
    assert shown == ["sky", HOSTILE.replace("\u202e", "[U+202E]"), "<0x0A>", "fox", "\u23ce", ""]
    assert [cell.get_attribute("class") for cell in cells] == ["readable", "", "", "readable", "", ""]
    assert cells[3].get_attribute("title") == "fox, cosine 0.40"
    assert browser.execute_script("return window.hacked") is None
    log = [entry["message"] for entry in browser.get_log("browser")]
    assert [message for message in log if "getImageData" not in message] == []  # a hint about this test's own reading


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_tint(browser, tmp_path, scheme):
    """WCAG contrast of at least 4.5, computed from what the browser says it painted."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    rng = np.random.default_rng(0)
    one = row("a", [" w"] * 8, rng)
    one.delta[:] = [-9, -2, 0, 1, 2, 3.5, 4.9, 9]
    open_page(browser, tmp_path, [ScoredModel("m", [one])])
    pairs = browser.execute_script("""
        const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const paper = getComputedStyle(document.body).backgroundColor;
        const pixel = (...layers) => {
          for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
          return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        };
        return [...document.querySelectorAll(".answer .tok")].map((token) => {
          const style = getComputedStyle(token);
          return [pixel(paper, style.backgroundColor), pixel(style.color)];
        });
    """)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def luminance(rgb):
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    contrasts = []
    for background, ink in pairs:
        bright, dim = sorted((luminance(background), luminance(ink)), reverse=True)
        contrasts.append((bright + 0.05) / (dim + 0.05))
    assert len(contrasts) == 8 and min(contrasts) >= 4.5, contrasts
    assert len({tuple(background) for background, _ in pairs}) >= 6  # the tints differ; 0 and 1 are both plain


def test_fifty_thousand_samples_stay_usable(browser, tmp_path):
    rng = np.random.default_rng(0)
    words = [f" word{i}" for i in range(500)]
    rows = [row(f"sample-{i}", [words[j] for j in rng.integers(0, 500, 12)], rng) for i in range(50_000)]
    began = time.perf_counter()
    page = open_page(browser, tmp_path, [ScoredModel("m", rows)])
    opened = time.perf_counter() - began
    assert page.stat().st_size < 60 * 2**20
    assert browser.get_log("browser") == []
    assert len(find(browser, ".answer .tok")) == 20 * 12  # one page of samples at a time
    assert "50,000 of 50,000" in find(browser, "#count")[0].text

    began = time.perf_counter()
    browser.execute_script("""
        const order = document.getElementById("order");
        order.value = "against"; order.dispatchEvent(new Event("change"));
    """)
    ordered = time.perf_counter() - began
    lowest = min(rows, key=lambda one: one.delta.min())
    assert find(browser, ".sample .id")[0].text.startswith(f"{lowest.id} ")

    began = time.perf_counter()
    find(browser, "#filter")[0].send_keys("sample-4999")
    for _ in range(100):
        if " of 50,000" in (text := find(browser, "#count")[0].text) and not text.startswith("50,000"):
            break
        time.sleep(0.1)
    found = time.perf_counter() - began
    assert text.startswith("11 of")  # sample-4999 and sample-49990 to 49999
    size = f"{page.stat().st_size / 2**20:.1f} MiB"
    print(f"{size}; built and opened {opened:.1f} s, sorted {ordered:.2f} s, found {found:.2f} s")
    assert ordered < 10 and found < 12  # loose: the machine may be busy
    assert browser.get_log("browser") == []
