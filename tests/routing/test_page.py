"""The routing report's page in a real browser: `make test-browser`."""

import os
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tiny_reports import NASTY, contexts_of, read_page, save_gnmt, save_lm, unpack, without_pictures

from moe_hf.routing.report import routing_report

pytestmark = pytest.mark.browser

PROGRAMS = {"chromium": ("chromium", "chromium-browser", "google-chrome"), "driver": ("chromedriver",)}
OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --force-color-profile=srgb"""


def find_programs() -> dict[str, str]:
    """Where Chromium and its driver are; without them the test is skipped, or with MOE_HF_BROWSER=required fails."""
    found = {name: next(filter(None, map(shutil.which, names)), None) for name, names in PROGRAMS.items()}
    if None in found.values():
        reason = f"no browser: {found}; install it, on Debian by apt-get install chromium chromium-driver"
        pytest.fail(reason) if os.environ.get("MOE_HF_BROWSER") == "required" else pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    programs = find_programs()
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is in the extra dev")
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for option in OPTIONS.split():
        options.add_argument(option)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs["driver"]))
    browser.set_page_load_timeout(60)
    browser.set_script_timeout(60)
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """{name: page} of a small language model, one whose training logged once, a translation model, and 4096 experts in
    64 groups.
    """
    folder = tmp_path_factory.mktemp("reports")
    options = {"num_contexts": 4, "context_width": 3}
    many = {"num_experts": 4096, "num_experts_per_tok": 4, "num_expert_groups": 64, "moe_intermediate_size": 2}
    for name in ("small", "once", "gnmt", "many"):
        (folder / name).mkdir()
    save_lm(folder / "small", num_experts=6)
    save_lm(folder / "once", num_logs=1)
    save_lm(folder / "many", **many)
    save_gnmt(folder / "gnmt", num_experts=7, gating="strictly_balanced")
    files = {name: ["text.txt"] for name in ("small", "once", "many")} | {"gnmt": ["text.en", "text.de"]}
    pages = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_pictures(monkeypatch)
        for name, texts in files.items():
            pages[name] = folder / f"{name}.html"
            routing_report(str(folder / name), [str(folder / name / text) for text in texts], pages[name], **options)
    return pages


class Page:
    """A report in the browser, and its data."""

    def __init__(self, driver, file: Path):
        self.driver, self.data = driver, read_page(file)
        driver.get("about:blank")
        driver.get_log("browser")
        driver.get(file.as_uri())

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def click(self, selector: str, index: int = 0) -> None:
        element = self.driver.find_elements("css selector", selector)[index]
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        element.click()

    def search(self, words: str) -> None:
        """Types into the search field and waits until the table shows the words."""
        box = self.driver.find_element("css selector", "#search")
        self.run("arguments[0].value = ''; state.found = null", box)
        box.send_keys(words or " ")
        self.wait("return state.found !== null")

    def wait(self, condition: str) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 20).until(lambda driver: driver.execute_script(condition))

    def keys(self, *names: str) -> None:
        from selenium.webdriver.common.keys import Keys

        for name in names:
            self.driver.switch_to.active_element.send_keys(getattr(Keys, name))


@pytest.fixture
def open_page(driver, reports):
    """Open a report; at the end the browser must have nothing to complain of, and have fetched nothing."""
    driver.set_window_size(1400, 1000)
    opened = []

    def open_report(name: str) -> Page:
        opened.append(Page(driver, reports[name]))
        return opened[-1]

    yield open_report
    for page in opened:
        assert page.run("return window.broken") is None
        assert page.run("return performance.getEntriesByType('resource').length") == 0
    assert driver.get_log("browser") == []


@contextmanager
def media(driver, **features):
    """Sets the reader's settings that the page sees."""
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]},
    )
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def visible(text: str) -> str:
    """As the middle of a context is shown."""
    return text.strip() or "␣" if text else "·"


INTRODUCTION = """
const before = document.createRange();
before.setStart(document.body, 0);
before.setEndBefore(document.querySelector("svg, canvas, dl"));
return before.toString().replace(/\\s+/g, " ");
"""


def test_the_page_says_what_an_expert_and_a_gate_are_before_its_first_number(open_page):
    for name, chosen in (("small", "2 of 6 experts"), ("gnmt", "on average 2 of 7 experts")):
        page = open_page(name)
        before = page.run(INTRODUCTION)
        for word in ("small feed-forward networks, the experts", "gate picks", "gate value", "load", "importance"):
            assert word in before, (name, word)
        assert chosen in before


COLOURS = """
const colour = (selector, property) => {
  const numbers = getComputedStyle(document.querySelector(selector))[property].match(/[\\d.]+/g);
  return numbers.slice(0, 3).join(",");
};
return {
  load: [colour("#balance .bar", "fill"), colour("#balance .bar.chosen", "fill"),
    colour("#key .load i", "backgroundColor"), colour("#table .meter i", "backgroundColor"),
    colour("#history path.load", "stroke")],
  gate: [colour("#balance circle", "fill"), colour("#key .gate i", "backgroundColor"),
    colour("#token .meter i", "backgroundColor"), colour("#history path.importance", "stroke")],
  pairs: [colour("#pairs .scale span:first-child i", "backgroundColor"),
    colour("#pairs .scale span:last-child i", "backgroundColor")],
  other: [colour("#table .link", "color"), colour("#layers label", "backgroundColor"), colour("#token", "borderColor"),
    colour("#balance .bar.chosen", "stroke"), colour("#token", "outlineColor"), colour("rect.counted", "fill")],
};
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_colour_has_one_meaning(scheme, open_page, driver):
    with media(driver, prefers_color_scheme=scheme):
        page = open_page("small")
        page.click("#passage .token")
        found = {meaning: set(colours) for meaning, colours in page.run(COLOURS).items()}
    (load,), (gate,) = found["load"], found["gate"]
    assert load != gate and len(found["pairs"]) == 2
    assert not {load, gate} & (found["pairs"] | found["other"]) and not found["pairs"] & found["other"]


def test_the_matrix_of_pairs_has_axes_and_a_scale(open_page):
    page = open_page("small")
    assert page.texts("#pairs .axis") == ["expert", "expert"]
    assert page.texts("#pairs .columns-axis .tick") == page.texts("#pairs .rows-axis .tick") == list("012345")
    boxes = page.run(
        """const box = (e) => e.getBoundingClientRect().toJSON();
        const all = (selector) => [...document.querySelectorAll(selector)].map(box);
        return [box(document.querySelector("canvas")), all(".columns-axis .tick"), all(".rows-axis .tick")];"""
    )
    canvas, columns, rows = boxes
    for i in range(6):
        assert columns[i]["left"] + columns[i]["width"] / 2 == pytest.approx(
            canvas["left"] + canvas["width"] * (i + 0.5) / 6, abs=1
        )
        assert rows[i]["top"] + rows[i]["height"] / 2 == pytest.approx(
            canvas["top"] + canvas["height"] * (i + 0.5) / 6, abs=1
        )
        assert columns[i]["top"] >= canvas["bottom"] - 1 and rows[i]["right"] <= canvas["left"] + 1
    assert page.texts("#pairs .scale span") == ["⅛", "¼", "½", "1", "2", "4", "8×"]


def test_every_chart_names_its_axes(open_page):
    page = open_page("gnmt")
    charts = page.run(
        """const charts = [...document.querySelectorAll("#balance svg:not(.specialisation), #history svg")];
        return charts.map((chart) => [...chart.querySelectorAll(".axis")].map((e) => e.textContent))"""
    )
    assert len(charts) == 7 and all(len(names) == 2 and all(names) for names in charts)


def test_a_history_of_one_log_is_told_in_numbers(open_page):
    page = open_page("once")
    assert page.run("return document.querySelectorAll('#history svg').length") == 0
    assert page.texts("#history dt") == ["CV(Importance)", "CV(Load)", "max/mean load", "experts without a token"]
    assert page.texts("#history dd:not(.extra)") == ["1.00", "2.00", "2.00", "0"]
    assert "at step 10" in page.text("#history-note")


def test_an_expert_shows_its_contexts(open_page):
    page = open_page("small")
    (layer,) = page.data["layers"]
    contexts = contexts_of(page.data, layer)
    for row in range(layer["num_experts"]):
        page.click("#table tbody .link", row)
        assert page.text("#expert-title") == f"Expert {row}"
        shown = list(zip(page.texts("#expert .token.middle"), page.texts("#expert .contexts li")))
        expected = contexts[row]
        assert [token for token, _ in shown] == [visible(token) for token, _ in expected] and expected
        for (_, line), (_, words) in zip(shown, expected):
            assert line.endswith(words)
        gates = [float(gate) for gate in page.texts("#expert .gate")]
        assert gates == sorted(gates, reverse=True)
        assert page.run("return location.hash") == f"#layers.1/{row}"


def test_a_token_shows_its_experts_and_leads_to_them(open_page):
    page = open_page("small")
    (layer,) = page.data["layers"]
    width = layer["routing"]["width"]
    experts = unpack(layer["routing"]["experts"]).reshape(-1, width)
    gates = unpack(layer["routing"]["gates"]).reshape(-1, width) / 65535
    for place in (0, 7, 20):
        page.click("#passage .token", place)
        assert page.texts("#token li .link") == [f"expert {expert}" for expert in experts[place]]
        assert page.texts("#token li span:last-child") == [f"{gate:.3f}" for gate in gates[place]]
        assert page.run("return document.activeElement.id") == "token"
        if place != 20:
            page.keys("ESCAPE")
    page.click("#token li .link")
    assert page.text("#expert-title") == f"Expert {experts[20, 0]}"
    assert page.run("return document.querySelector('#token').hidden")
    # The passage's tokens that this expert gets are coloured.
    coloured = page.run(
        "return [...document.querySelectorAll('#passage .token')].map((e) => e.style.background !== '')"
    )
    passage = page.data["sides"][""]["passage"]
    assert coloured == (experts[:passage] == experts[20, 0]).any(axis=1).tolist()


def test_tokens_of_both_sides_of_a_translation_model(open_page):
    page = open_page("gnmt")
    assert page.texts("#layers label") == ["encoder.layers.2", "decoder.layers.1"]
    for number, layer in enumerate(page.data["layers"]):
        page.click("#layers label", number)
        used, width = unpack(layer["routing"]["num_used"]), layer["routing"]["width"]
        experts = unpack(layer["routing"]["experts"]).reshape(-1, width)
        assert len(set(used.tolist())) > 1  # of strictly balanced gating
        for count in set(used.tolist()):
            place = int(np.argmax(used[: page.data["sides"][layer["side"]]["passage"]] == count))
            if used[place] == count:
                page.click("#passage .token", place)
                page.wait("return !document.querySelector('#token').hidden")
                assert page.texts("#token li .link") == [f"expert {e}" for e in experts[place][:count]]
                assert count or "no expert" in page.text("#token")
                page.keys("ESCAPE")
        assert str(layer["num_experts"]) in page.text("#summary")


def test_search_finds_the_experts_whose_contexts_have_the_words(open_page):
    page = open_page("many")
    (layer,) = page.data["layers"]
    typical, width = unpack(layer["words"]["typical"]["words"]), layer["words"]["typical"]["width"]
    vocabulary, contexts = page.data["vocabulary"]["texts"], contexts_of(page.data, layer)
    for words in ("dog", "saw a tree", "no such words", "SCRIPT"):
        page.search(words)
        expected = set()
        for expert in range(layer["num_experts"]):
            known = [vocabulary[i] for i in typical[expert * width : (expert + 1) * width] if i != 0xFFFFFFFF]
            known += [context for _, context in contexts[expert]]
            if any(words.lower() in text.lower() for text in known):
                expected.add(expert)
        assert set(page.run("return state.found")) == expected
    assert expected
    page.search("#1234")
    assert page.texts("#table tbody th .link") == ["1234"]
    page.search("group 3")
    assert page.run("return state.found") == list(range(3 * 64, 4 * 64))


@pytest.mark.parametrize(("key", "array"), [("load", "load"), ("importance", "importance")])
def test_the_table_is_sorted_and_in_pages(key, array, open_page):
    page = open_page("many")
    values = unpack(page.data["layers"][0][array])
    page.click(f"#sort option[value={key}]")
    assert page.run("return state.found") == sorted(range(4096), key=lambda e: -float(values[e]))
    first = page.texts("#table tbody th .link")
    assert len(first) == 25
    page.click("#next-page")
    assert page.texts("#table tbody th .link") == [str(e) for e in page.run("return state.found")[25:50]]
    page.click("#previous-page")
    assert page.texts("#table tbody th .link") == first
    page.click("#descending")
    assert page.run("return state.found") == sorted(range(4096), key=lambda e: values[e])


def test_with_4096_experts_the_page_stays_small(open_page):
    page = open_page("many")
    assert page.run("return document.querySelectorAll('*').length") < 5000


def test_text_that_looks_like_markup_is_shown_as_it_is(open_page):
    page = open_page("gnmt")
    assert NASTY in page.text("#passage")
    assert page.run("return document.querySelectorAll('img').length") == 0


def test_the_keyboard_does_all(open_page):
    page = open_page("small")
    page.run("document.querySelector('#passage .token').focus()")
    page.keys("ARROW_RIGHT", "ARROW_RIGHT", "ARROW_LEFT")
    assert page.run("return document.activeElement.dataset.place") == "1"
    page.keys("ENTER")
    assert not page.run("return document.querySelector('#token').hidden")
    page.keys("ESCAPE")
    assert page.run("return document.querySelector('#token').hidden")
    assert page.run("return document.activeElement.dataset.place") == "1"
    page.run("document.querySelector('#expert .step:last-child').focus()")
    before = int(page.text("#expert-title").split()[1])
    page.keys("ENTER", "ENTER")
    assert page.text("#expert-title") == f"Expert {(before + 2) % 6}"
    stops = page.run(
        """const focusable = [...document.querySelectorAll("button, input, select, [tabindex]")];
        return focusable.filter((e) => e.tabIndex >= 0 && e.closest("#passage")).length"""
    )
    assert stops == 1  # of all the tokens of the passage


def test_everything_has_a_name_for_a_screen_reader(open_page):
    page = open_page("gnmt")
    page.click("#passage .token")
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    wanted = {"button", "radio", "searchbox", "combobox", "checkbox", "spinbutton", "dialog", "image", "radiogroup"}
    seen = Counter(node["role"]["value"] for node in nodes if not node["ignored"])
    assert {"button", "radio", "searchbox", "combobox", "dialog", "image"} <= set(seen)
    for node in nodes:
        if not node["ignored"] and node["role"]["value"] in wanted:
            assert node.get("name", {}).get("value", "").strip(), node


CONTRAST = """
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const luminance = (colour) => {
  const [r, g, b] = colour.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const background = (e) => {
  const [r, g, b, alpha = 1] = numbers(getComputedStyle(e).backgroundColor);
  if (alpha === 1) return [r, g, b];
  const behind = background(e.parentElement);
  return [r, g, b].map((v, i) => alpha * v + (1 - alpha) * behind[i]);
};
const low = [];
for (const e of document.querySelectorAll("main *, header *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || e.closest("svg, canvas, option") || !e.checkVisibility()) continue;
  const [a, b] = [luminance(numbers(getComputedStyle(e).color)), luminance(background(e))];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < 4.5) low.push([e.outerHTML.slice(0, 80), contrast]);
}
return low;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(scheme, open_page, driver):
    with media(driver, prefers_color_scheme=scheme):
        page = open_page("gnmt")
        for expert in range(7):
            page.click("#table tbody .link", expert)
            assert page.run(CONTRAST) == []
        page_background = page.run("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, page_background[4:-1].split(","))) > 384) == (scheme == "light")


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_nothing_is_wider_than_the_window(width, open_page, driver):
    page = open_page("many")
    # A window has a minimum width; the page gets a telephone's width by emulation.
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        assert page.run("return innerWidth") == width
        page.click("#expert .token")
        assert page.run("return document.documentElement.scrollWidth") <= width
        box = page.run("return document.querySelector('#token').getBoundingClientRect().toJSON()")
        assert box["left"] >= 0 and box["right"] <= width
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_link_leads_to_its_expert(open_page, driver):
    page = open_page("gnmt")
    page.run("location.hash = '#decoder.layers.1/5'")
    page.wait("return document.querySelector('#expert-title').textContent === 'Expert 5'")
    assert page.run("return state.layer.name") == "decoder.layers.1"
    for unknown in ("#nothing/3", "#decoder.layers.1/7", "#%3Cscript%3E"):
        page.run("location.hash = arguments[0]", unknown)
        page.wait("return document.querySelector('#expert-title').textContent.startsWith('Expert ')")
