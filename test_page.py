"""Tests of the page, in real browsers; each name is a claim."""

import pytest
from aiohttp.test_utils import unused_port
from bson import ObjectId

import chat
from conftest import NO_BROWSER, PASSWORD, need, on, optional, until


async def open_page(browser, url, **options):
    """Open a window of its own, which fails the test if the page has an error."""
    context = await browser.new_context(**options)
    page = await context.new_page()
    page.set_default_timeout(15_000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: note_violation(page, message.text))
    await page.goto(url)
    return page


def note_violation(page, text):
    if "Content Security Policy" in text:
        page.errors.append(text)


async def sign_up(browser, url, name="ann", **options):
    page = await open_page(browser, url, **options)
    await page.click("text=Create an account")
    await fill_in(page, name)
    if options.get("java_script_enabled", True):
        await page.wait_for_selector("#status[data-status=online]")
    return page


async def fill_in(page, name):
    await page.fill("#login", name)
    await page.fill("#password", PASSWORD)
    await page.fill("#password2", PASSWORD)
    await page.click("main button")


async def write(page, text):
    await page.fill("#text", text)
    await page.press("#text", "Enter")


async def wait_for_text(page, text, pending=False):
    selector = f"#messages li{'.pending' if pending else '[data-id]'} p"
    await page.locator(selector, has_text=text).first.wait_for()


async def texts(page):
    """What the log shows: sent messages, in order."""
    return await page.locator("#messages li[data-id] p").all_inner_texts()


async def test_two_people_chat_in_two_windows(browser, server):
    url = str(server.make_url("/"))
    ann = await sign_up(browser, url, "ann")
    bob = await sign_up(browser, url, "bob")
    await ann.locator("#online li", has_text="bob").wait_for()
    await ann.locator(".notice", has_text="bob joined").wait_for()
    await write(ann, "hello, bob")
    await wait_for_text(bob, "hello, bob")
    await bob.fill("#text", "hello, ann")
    await bob.click("#send button")
    await wait_for_text(ann, "hello, ann")
    assert await texts(ann) == await texts(bob) == ["hello, bob", "hello, ann"]
    assert await ann.locator("li.own").count() == 1
    await bob.reload()
    await bob.wait_for_selector("#status[data-status=online]")
    assert await texts(bob) == ["hello, bob", "hello, ann"]
    await bob.click("text=Sign out")
    await bob.wait_for_url("**/login")
    await ann.locator(".notice", has_text="bob left").wait_for()
    assert await ann.locator("#online li").all_inner_texts() == ["ann"]
    assert ann.errors == bob.errors == []


async def test_markup_arrives_as_text(browser, server):
    url = str(server.make_url("/"))
    ann, bob = await sign_up(browser, url), await sign_up(browser, url, "bob")
    markup = "<img src=x onerror=\"document.title='hacked'\"><b>bold</b>\n&amp; 'x'"
    await ann.fill("#text", markup)
    await ann.press("#text", "Enter")
    await wait_for_text(bob, "bold")
    assert await texts(bob) == await texts(ann) == [markup]
    await bob.reload()
    assert await texts(bob) == [markup]
    assert await bob.locator("#log img, #log b").count() == 0
    assert await bob.title() == "Chat"


async def test_what_is_typed_while_the_server_is_away_is_sent_once_when_it_is_back(
    browser, start, mongodb
):
    """The process is killed under two open pages and started again on its port."""
    environment = {
        "MONGO_HOST": mongodb,
        "MONGO_DB_NAME": f"test-{ObjectId()}",
        "SECRET_KEY": "any text",
        "PORT": str(unused_port()),
    }
    process = start(**environment).wait_until_ready()
    ann = await sign_up(browser, process.url, "ann")
    bob = await sign_up(browser, process.url, "bob")
    await write(ann, "before")
    await wait_for_text(bob, "before")
    process.process.kill()
    await ann.wait_for_selector("#status[data-status=offline]")
    for text in "first", "second", "third":
        await write(ann, text)
    await wait_for_text(ann, "third", pending=True)
    await ann.fill("#text", "half a sen")
    start(**environment).wait_until_ready()
    for page in ann, bob:
        await wait_for_text(page, "third")
        assert await texts(page) == ["before", "first", "second", "third"]
    assert await ann.locator(".pending").count() == 0
    assert await ann.input_value("#text") == "half a sen"
    assert ann.errors == bob.errors == []


async def test_after_a_restart_in_memory_the_unsent_text_outlives_the_login(
    browser, start
):
    """The account is gone with the process; what was typed stays in the tab."""
    port = str(unused_port())
    process = start(PORT=port).wait_until_ready()
    ann = await sign_up(browser, process.url, "ann")
    process.process.kill()
    await ann.wait_for_selector("#status[data-status=offline]")
    await write(ann, "sent while away")
    await ann.fill("#text", "half a sen")
    start(PORT=port).wait_until_ready()
    await ann.wait_for_url("**/login")
    await ann.click("text=Create an account")
    await fill_in(ann, "ann")
    await wait_for_text(ann, "sent while away")
    assert await texts(ann) == ["sent while away"]
    assert await ann.input_value("#text") == "half a sen"


async def test_page_keeps_a_message_that_was_not_saved_and_sends_it_again(
    browser, serve, standalone
):
    server = await serve(on(standalone.uri))
    ann = await sign_up(browser, str(server.make_url("/")))
    standalone.kill()
    await write(ann, "not yet")
    await ann.locator("#problem", has_text="could not be saved").wait_for()
    await wait_for_text(ann, "not yet", pending=True)
    assert await ann.get_attribute("#status", "data-status") == "online"
    standalone.start()
    await wait_for_text(ann, "not yet")
    assert await texts(ann) == ["not yet"]
    assert await ann.inner_text("#problem") == ""


async def test_who_types_too_fast_loses_nothing(browser, serve):
    server = await serve(chat.Settings(MESSAGE_BURST=3, MESSAGES_PER_SECOND=5))
    ann = await sign_up(browser, str(server.make_url("/")))
    expected = [f"message {number}" for number in range(8)]
    for text in expected:
        await write(ann, text)
    await wait_for_text(ann, expected[-1])
    assert await texts(ann) == expected


async def test_message_too_long_stays_in_the_box(browser, serve):
    server = await serve(chat.Settings(MAX_MESSAGE_LENGTH=10))
    ann = await sign_up(browser, str(server.make_url("/")))
    await write(ann, "eleven, no?")
    await ann.locator("#problem", has_text="at most 10 characters").wait_for()
    assert await ann.input_value("#text") == "eleven, no?"
    await ann.evaluate("document.getElementById('text').dataset.maxLength = 99")
    await write(ann, "😀😀😀😀😀😀😀😀😀😀")  # ten characters
    await wait_for_text(ann, "😀")


async def test_message_the_server_will_never_take_comes_back_to_the_box(browser, serve):
    """The page was loaded when the server still allowed more."""
    server = await serve(chat.Settings(MAX_MESSAGE_LENGTH=20))
    ann = await sign_up(browser, str(server.make_url("/")))
    object.__setattr__(server.app[chat.SETTINGS], "MAX_MESSAGE_LENGTH", 5)
    await write(ann, "too long by now")
    await ann.locator("#problem", has_text="too long").wait_for()
    assert await ann.input_value("#text") == "too long by now"
    await write(ann, "short")
    await wait_for_text(ann, "short")
    assert await texts(ann) == ["short"]


async def test_sign_up_errors_stand_beside_their_fields(browser, server):
    page = await open_page(browser, str(server.make_url("/signin")))
    await page.fill("#login", "a!")
    await page.fill("#email", "ann@example.org")
    await page.fill("#password", "short")
    await page.fill("#password2", "different")
    await page.click("main button")
    for name, sentence in {
        "login": "3 to 32 letters",
        "password": "8 to 128",
        "password2": "not the same",
    }.items():
        note = await page.get_attribute(f"#{name}", "aria-describedby")
        assert sentence in await page.inner_text(f"#{note}.error")
        assert await page.get_attribute(f"#{name}", "aria-invalid") == "true"
    assert await page.input_value("#email") == "ann@example.org"
    assert await page.input_value("#login") == "a!"
    assert await page.evaluate("document.activeElement.id") == "login"
    await fill_in(page, "ann")
    await page.wait_for_selector("#status[data-status=online]")


async def test_forms_and_history_work_without_javascript(browser, server):
    url = str(server.make_url("/"))
    ann = await sign_up(browser, url)
    await write(ann, "for all")
    await wait_for_text(ann, "for all")
    bob = await sign_up(browser, url, "bob", java_script_enabled=False)
    assert await texts(bob) == ["for all"]
    assert "needs JavaScript" in await bob.inner_text("noscript")
    await bob.click("text=Sign out")
    await bob.wait_for_url("**/login")


async def test_older_messages_come_into_the_page(browser, server):
    room, user = server.app[chat.ROOM], {"_id": ObjectId(), "name": "bob"}
    for number in range(1, 121):
        await room.say(user, f"text {number}", f"{number}")
    await until(lambda: room.last == 120)
    ann = await sign_up(browser, str(server.make_url("/")))
    for shown in 100, 120:
        await ann.click("#older")
        first = 121 - shown
        await ann.wait_for_selector(
            f"#messages li[data-id='{first}']", state="attached"
        )
    assert await texts(ann) == [f"text {number}" for number in range(1, 121)]
    assert await ann.locator("#older").count() == 0
    assert ann.errors == []


async def test_reader_who_scrolled_up_is_left_there(browser, server):
    room, user = server.app[chat.ROOM], {"_id": ObjectId(), "name": "bob"}
    for number in range(1, 51):
        await room.say(user, f"text {number}", f"{number}")
    await until(lambda: room.last == 50)
    ann = await sign_up(browser, str(server.make_url("/")))
    at_end = "log.scrollHeight - log.scrollTop - log.clientHeight < 5"
    assert await ann.evaluate(at_end)
    await room.say(user, "followed", "51")
    await wait_for_text(ann, "followed")
    assert await ann.evaluate(at_end)
    await ann.evaluate("log.scrollTop = 10")
    await room.say(user, "not followed", "52")
    await wait_for_text(ann, "not followed")
    assert await ann.evaluate("log.scrollTop") == 10


async def test_unread_messages_are_counted_in_the_title(browser, server):
    room, user = server.app[chat.ROOM], {"_id": ObjectId(), "name": "bob"}
    ann = await sign_up(browser, str(server.make_url("/")))
    await ann.evaluate(
        "Object.defineProperty(document, 'hidden', { value: true, writable: true })"
    )
    for number in range(3):
        await room.say(user, f"text {number}", f"{number}")
    await wait_for_text(ann, "text 2")
    assert await ann.title() == "(3) Chat"
    await ann.evaluate("document.hidden = false")
    await ann.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    assert await ann.title() == "Chat"


async def test_page_that_missed_too_much_loads_itself_anew(browser, serve, start):
    server = await serve(chat.Settings())
    ann = await sign_up(browser, str(server.make_url("/")))
    room, user = server.app[chat.ROOM], {"_id": ObjectId(), "name": "bob"}
    await room.say(user, "text 1", "1")
    await wait_for_text(ann, "text 1")
    await ann.context.set_offline(True)
    await ann.evaluate("socket.close()")
    await ann.wait_for_selector("#status[data-status=offline]")
    for number in range(2, chat.KEPT + 100):
        await room.say(user, f"text {number}", f"{number}")
    await ann.context.set_offline(False)
    await wait_for_text(ann, f"text {chat.KEPT + 99}")
    first = chat.KEPT + 100 - chat.PAGE
    assert await texts(ann) == [f"text {n}" for n in range(first, first + chat.PAGE)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing(browser, server, scheme):
    axe = need(optional("axe_playwright_python.async_playwright"), NO_BROWSER).Axe()
    url = str(server.make_url("/"))
    ann = await sign_up(browser, url, color_scheme=scheme)
    await write(ann, "hello")
    await wait_for_text(ann, "hello")
    form = await open_page(browser, url, color_scheme=scheme)
    wrong = await open_page(browser, url + "signin", color_scheme=scheme)
    await wrong.fill("#login", "a!")
    await wrong.fill("#password", "x")
    await wrong.fill("#password2", "y")
    await wrong.click("main button")
    history = await ann.context.new_page()
    await history.goto(url + "?before=9")
    for page in ann, form, wrong, history:
        results = await axe.run(page)
        assert results.violations_count == 0, results.generate_report()


async def test_pages_fit_360_pixels(browser, server):
    url, size = str(server.make_url("/")), {"width": 360, "height": 640}
    ann = await sign_up(browser, url, "x" * 32, viewport=size)
    await write(ann, "long" * 200)
    await wait_for_text(ann, "long")
    form = await open_page(browser, url + "signin", viewport=size)
    for page in ann, form:
        assert await page.evaluate("document.documentElement.scrollWidth") == 360
    box = await ann.locator("#send button").bounding_box()
    assert box["y"] + box["height"] <= 640


async def test_chat_works_by_keyboard_alone(browser, server):
    page = await open_page(browser, str(server.make_url("/signin")))
    for text in "ann", "", PASSWORD, PASSWORD:
        await page.keyboard.press("Tab")
        await page.keyboard.type(text)
    await page.keyboard.press("Enter")
    await page.wait_for_selector("#status[data-status=online]")
    await page.keyboard.type("one")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("two")
    await page.keyboard.press("Enter")
    await wait_for_text(page, "two")
    assert await texts(page) == ["one\ntwo"]
    await page.keyboard.press("Shift+Tab")
    assert await page.evaluate("document.activeElement.id") == "log"
