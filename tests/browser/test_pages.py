"""The report and its audit page in a real browser: what a reader does with them, on a desk and on a phone, light and dark."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium.webdriver import ActionChains, Keys

from ebjdat.settings import Profile

from .conftest import Browser

WIDE, PHONE = 1280, 375
NAMES = "#summary tbody td:first-child > a:first-child"
# WCAG's contrast of every visible text with the first ground that is not transparent behind it
CONTRAST = """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (at) => {
  for (; at; at = at.parentElement) { const c = rgb(getComputedStyle(at).backgroundColor); if (c[3] !== 0) return c; }
  return [255, 255, 255];
};
return [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.closest(".off")
    && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())).map((e) => {
  const style = getComputedStyle(e), ink = rgb(e instanceof SVGElement ? style.fill : style.color);
  const [a, b] = [light(ink), light(ground(e))].sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05), e.tagName + "." + (e.className.baseVal ?? e.className) + ": " + e.textContent.trim().slice(0, 40)];
}).filter(([ratio]) => !(ratio >= 4.5));
"""


def address(site: Path, page: str = "report.html") -> str:
    return (site / page).as_uri()


@pytest.mark.parametrize("page", ["report.html", "audit.html"])
def test_a_page_opens_from_a_file_without_network_or_errors(browser: Browser, site: Path, page: str) -> None:
    browser.open(address(site, page))
    browser.js("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    browser.js("[...document.images].forEach((image) => { image.loading = 'eager'; })")  # as if scrolled to
    pictures = "return [...document.images].every((image) => image.complete && image.naturalWidth > 0)"
    browser.wait(lambda: browser.js(pictures), "pictures")
    asked = [url for url in browser.requests() if not url.startswith("data:")]
    assert asked == [address(site, page)]
    assert browser.errors() == []


def test_a_head_sorts_its_table_and_says_so(browser: Browser, site: Path, profile: Profile) -> None:
    browser.open(address(site))
    as_written = list(profile.experiments)
    assert browser.texts(NAMES) == as_written  # clean accuracy falls along them, as `fill` made it
    gap = next(head for head in browser.all("#summary th") if head.text.startswith("gap adv."))
    gap.find_element("tag name", "button").click()
    assert (gap.get_attribute("aria-sort"), browser.texts(NAMES)) == ("ascending", as_written)  # less is better: that comes first
    gap.find_element("tag name", "button").send_keys(Keys.ENTER)  # by keyboard
    assert (gap.get_attribute("aria-sort"), browser.texts(NAMES)) == ("descending", as_written[::-1])
    name, clean = browser.all("#summary th")[:2]
    clean.find_element("tag name", "button").click()
    assert (gap.get_attribute("aria-sort"), clean.get_attribute("aria-sort")) == (None, "descending")
    assert browser.texts(NAMES) == as_written
    name.find_element("tag name", "button").click()
    assert browser.texts(NAMES) == sorted(as_written)


def test_what_was_not_measured_sorts_last_either_way(browser: Browser, site: Path, profile: Profile) -> None:
    browser.open(address(site))
    browser.js("document.querySelector('#summary tbody tr').cells[1].dataset.v = ''")
    for _ in range(2):
        browser.all("#summary th button")[1].click()
        assert browser.texts(NAMES)[-1] == next(iter(profile.experiments))


def test_filters_hide_rows_and_sections_and_fade_points(browser: Browser, site: Path, profile: Profile) -> None:
    browser.open(address(site))
    browser.one(".toolbar input").send_keys("eb_j")
    assert browser.texts(NAMES) == ["eb_jdat"]
    assert browser.texts(".toolbar output") == [f"1 of {len(profile.experiments)}"]
    assert [part.get_attribute("id") for part in browser.all("details.experiment") if part.is_displayed()] == ["experiment-eb_jdat"]
    faded = {point.get_attribute("data-kind") for point in browser.all(".point.off")}
    assert faded == {entry.method for entry in profile.experiments.values()} - {"eb_jdat"}
    browser.one(".toolbar input").clear()
    browser.one(".toolbar input").send_keys(Keys.SPACE)
    assert browser.texts(NAMES) == list(profile.experiments)
    browser.one(".toolbar option:nth-child(3)").click()
    assert browser.texts(NAMES) == ["pgd_at"]


def test_points_tell_their_values_to_pointer_and_keyboard(browser: Browser, site: Path) -> None:
    browser.open(address(site))
    points = browser.all(".point")
    browser.js("arguments[0].scrollIntoView({block: 'center'})", points[1])
    assert browser.texts("#tip") == []
    ActionChains(browser.driver).move_to_element(points[1]).perform()
    browser.wait(lambda: browser.texts("#tip") == ["pgd_at: clean %, n=100: 89.0 [81.4, 93.7]"], "values of the point")
    browser.js("arguments[0].focus()", points[0])
    ActionChains(browser.driver).send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN).perform()
    browser.wait(lambda: browser.texts("#tip")[0].startswith("jempp: clean %"), "values by keyboard")
    ActionChains(browser.driver).send_keys(Keys.ESCAPE).perform()
    assert browser.texts("#tip") == []


def test_a_name_leads_to_its_section_and_a_section_to_its_command(browser: Browser, site: Path) -> None:
    browser.open(address(site))
    section = browser.one("#experiment-eb_jdat")
    assert section.get_attribute("open") is None
    browser.one("a[href='#experiment-eb_jdat']").click()
    browser.wait(lambda: section.get_attribute("open"), "an open section")
    assert section.find_element("css selector", "img").is_displayed()
    browser.js("arguments[0].click()", section.find_element("css selector", "a[href^='#reproduce']"))
    command = browser.wait(lambda: browser.texts("#reproduce-eb_jdat-0 pre"), "a command")[0]
    assert command.startswith("git checkout abc\nsnakemake --cores all --config profile=digits -- results/digits/eb_jdat/seed0/")
    button = browser.one("#reproduce-eb_jdat-0 button")
    button.click()
    browser.wait(lambda: button.text == "Copied", "a copied command")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("page", ["report.html", "audit.html"])
def test_a_phone_shows_everything_without_scrolling_sideways(browser: Browser, site: Path, page: str, dark: bool) -> None:
    browser.open(address(site, page), PHONE, dark)
    browser.js("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert browser.js("return [document.documentElement.scrollWidth, innerWidth]") == [PHONE, PHONE]
    low = browser.js(CONTRAST)
    assert low == []
    ground = browser.js("return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(22, 26, 33)" if dark else "rgb(255, 255, 255)")


def test_hints_stand_where_something_scrolls(browser: Browser, site: Path) -> None:
    browser.open(address(site), PHONE)
    table = browser.one("#summary")
    assert table.size["width"] > PHONE
    assert browser.one(".hint").is_displayed()
    browser.open(address(site), WIDE)
    assert not browser.one(".hint").is_displayed()


def test_without_javascript_everything_is_there_to_read(browser: Browser, site: Path, profile: Profile) -> None:
    browser.open(address(site), script=False)
    try:
        assert browser.texts(NAMES) == list(profile.experiments)
        assert browser.texts(".toolbar, button") == []  # nothing stands there that would do nothing
        summary = browser.one("#experiment-eb_jdat summary")
        summary.click()
        assert browser.one("#experiment-eb_jdat img").is_displayed()
        assert "eb_jdat: clean %, n=100: 87.0" in browser.all(".point title")[3].get_attribute("textContent")
    finally:
        browser.cdp("Emulation.setScriptExecutionDisabled", value=False)


def test_the_audit_page_filters_claims_and_checks_apart(browser: Browser, site: Path) -> None:
    browser.open(address(site, "audit.html"))
    claims, checks = "#claim-part tbody tr", "#check-part tbody tr"
    everything = len(browser.texts(claims)), len(browser.texts(checks))
    browser.one("#claim-part option:nth-child(2)").click()
    verdict = browser.one("#claim-part option:nth-child(2)").text
    assert {row.get_attribute("data-kind") for row in browser.all(claims) if row.is_displayed()} == {verdict}
    assert len(browser.texts(claims)) < everything[0]
    assert len(browser.texts(checks)) == everything[1]
    browser.one("#check-part input").send_keys("jempp")
    assert [text.split("\n")[0] for text in browser.texts("#check-part tbody td:first-child")] == ["jempp"]
