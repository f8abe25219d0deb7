"""The demo page in headless Chromium, at desktop and phone width."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from lightning_rec.recommend import Event

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
#: Where screenshots go, for a person to look at; nowhere by default.
PICTURES = os.environ.get("LIGHTNING_REC_PICTURES")


@pytest.fixture(scope="module")
def browser():
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    arguments += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def address():
    """Serves applications on free ports: ``address(app)`` is where."""
    running = []

    def start(app):
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        for _ in range(500):
            if server.started:
                return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            time.sleep(0.02)
        raise RuntimeError("The service did not start.")

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(params=SIZES)
def page(request, browser):
    """A page that may reach nothing but the service, and must not complain."""
    width, height = SIZES[request.param]
    context = browser.new_context(
        viewport={"width": width, "height": height}, is_mobile=request.param == "phone", reduced_motion="reduce"
    )
    opened = context.new_page()
    opened.set_default_timeout(15_000)
    opened.complaints, opened.reached, opened.size = [], set(), request.param
    opened.on("console", lambda said: opened.complaints.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("request", lambda call: opened.reached.add(call.url.split("/")[2] if "//" in call.url else "data"))
    yield opened
    context.close()


def picture(page, name):
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"{name}_{page.size}.png"), full_page=True)


def titles(page):
    return page.locator("#items .title").all_text_contents()


def settled(page):
    """Waits until every item has its reason."""
    page.wait_for_function(
        "() => { const all = [...document.querySelectorAll('#items summary')];"
        " return all.length && all.every((one) => one.textContent !== '…'); }"
    )


def assert_fits(page):
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_a_known_user_takes_something_and_the_list_moves(serve, address, page):
    where = address(serve())
    page.goto(where)
    settled(page)
    before = titles(page)
    assert len(before) == 8
    assert "recommended because" in page.locator("#items summary").first.text_content()
    assert page.locator("#path").text_content() == "from the history"
    assert page.locator("#history li").count() > 1
    assert_fits(page)
    picture(page, "user")
    page.locator("#items .take").nth(2).click()
    page.wait_for_function("title => document.querySelector('#history li')?.textContent === title", arg=before[2])
    settled(page)
    after = titles(page)
    assert before[2] not in after
    assert after != before
    assert page.locator("#items .move.up").count()
    page.locator("#items summary").first.click()
    assert page.locator("#items .effects li").first.is_visible()
    picture(page, "user_after")
    assert page.complaints == []
    assert page.reached <= {where.split("/")[2], "data"}


def test_someone_new_says_what_they_like(serve, address, page):
    page.goto(address(serve()))
    settled(page)
    page.locator("#tab-words").click()
    assert titles(page) == []
    page.fill("#words", "a small green lamp")
    page.locator("#panel-words button").click()
    settled(page)
    assert page.locator("#path").text_content() == "from your words"
    picture(page, "words")
    first = titles(page)[0]
    page.locator("#items .take").first.click()
    page.wait_for_function("() => document.querySelector('#path').textContent === 'from the history'")
    settled(page)
    assert page.locator("#history li").all_text_contents() == [first]
    assert_fits(page)
    page.locator("#again").click()
    page.wait_for_function("() => document.querySelector('#path').textContent === 'from your words'")
    assert page.complaints == []


def test_titles_are_text_and_never_html(serve, address, page):
    app = serve()
    title = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>"
    recommender = app.service.served.recommender
    recommender.add_items([{"item_id": "<i>", "title": title}])
    recommender.update("<u>&amp;", [Event("<i>"), Event("t01")])
    page.goto(address(app))
    settled(page)  # the store's users come first
    assert page.locator("#some-users button").first.text_content() == "<u>&amp;"
    assert title in page.locator("#history li").all_text_contents()
    assert page.title() != "broken"
    assert page.locator("#history img, #items img, #items b").count() == 0


def test_it_asks_for_a_key(serve, address, page):
    page.goto(address(serve(keys="0123456789abcdef read; fedcba9876543210 events")))
    page.locator("#key").wait_for()
    assert "API key" in page.locator("#status").text_content()
    page.emulate_media(color_scheme="dark")
    picture(page, "key")
    page.fill("#key", "x" * 20)
    page.locator("#key-form button").click()
    page.wait_for_function("() => document.querySelector('#status').textContent.includes('not known')")
    page.fill("#key", "0123456789abcdef")
    page.locator("#key-form button").click()
    settled(page)
    page.locator("#items .take").first.click()  # this key may only read
    page.wait_for_function("() => document.querySelector('#status').textContent.includes('scope events')")
    assert not page.locator("#items .take").first.is_disabled()


def test_the_calls_are_listed_from_local_resources(serve, address, page):
    where = address(serve())
    page.goto(f"{where}/docs")
    page.locator(".call").first.wait_for()
    page.locator(".call", has_text="/v1/recommend").locator("summary").click()
    assert "filter_seen?" in page.locator(".call[open] pre").text_content()
    assert_fits(page)
    picture(page, "docs")
    assert page.complaints == []
    assert page.reached <= {where.split("/")[2], "data"}
