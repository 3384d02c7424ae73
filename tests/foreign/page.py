"""The page that the server serves at `/`, in a browser: Debian's chromium, driven by selenium.

Run as a program with the name of a file, it takes the picture of the page under load that the README shows.
"""

import contextlib
import http.client
import json
import pathlib
import random
import sys
import threading
import time

from selenium import webdriver
from selenium.webdriver.common.by import By

from support import MEBIBYTE, Raw, Server, attempt, equal, until

PHONE, DESKTOP = (360, 740), (1280, 900)


@contextlib.contextmanager
def browser(url, size=DESKTOP, scheme="light"):
    """The page, open in a fresh browser. The browser asks for nothing by itself."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    # It is fed nothing but our page, and as root it has no sandbox.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars", "--no-proxy-server",
                     "--disable-background-networking"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        resize(driver, size)
        prefer(driver, scheme)
        driver.get(url)
        yield driver
    finally:
        driver.quit()


def resize(driver, size):
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(driver, scheme, motion="no-preference"):
    features = [{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": motion}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def state(driver):
    return driver.find_element(By.ID, "state").get_attribute("data-state")


def shows(driver, selector, words):
    """Some element's text is, or contains, these words. In one step: the page changes all the time."""
    script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent)"
    return any(words in text for text in driver.execute_script(script, selector))


def tile(driver, name):
    script = """
        for (const term of document.querySelectorAll("#tiles dt"))
            if (term.textContent === arguments[0]) return term.nextElementSibling.textContent;
        return null;"""
    return driver.execute_script(script, name)


def url(server):
    return "http://{}:{}/".format(*server.addresses["http"])


@contextlib.contextmanager
def load(address, keys, clients=1, batch=200, writes=0.1):
    """Clients that ask for the keys, each as often as its weight, and now and then write one (of memcached, if any)."""
    ending, failed = threading.Event(), []
    names, weights = list(keys), list(keys.values())

    def client(seed):
        try:
            numbers = random.Random(seed)
            with Raw(address) as raw:
                while not ending.is_set():
                    chosen = numbers.choices(names, weights, k=batch)
                    commands = [b"set %s 0 0 5\r\nvalue\r\n" % key if numbers.random() < writes else b"get %s\r\n" % key for key in chosen]
                    raw.send(b"".join(commands))
                    answer = b""
                    while answer.count(b"END\r\n") + answer.count(b"STORED\r\n") < batch:
                        piece = raw.socket.recv(1 << 18)
                        if not piece:
                            raise AssertionError("the server closes the connection")
                        answer += piece
                    ending.wait(0.01)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ending.set()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]


def fill(server, count):
    """As many items, of different sizes."""
    with Raw(server.memcached) as raw:
        for start in range(0, count, 500):
            numbers = range(start, min(start + 500, count))
            commands = [b"ms user:%d %d q\r\n%s\r\n" % (n, 20 + n % 100, b"x" * (20 + n % 100)) for n in numbers]
            raw.ask(b"".join(commands) + b"mn\r\n", b"MN\r\n")


def be_slow(server, key=b"slow:one"):
    """Many large values that are asked for and not taken for a while: far more than sockets hold."""
    with Raw(server.memcached) as raw:
        raw.ask(b"set %s 0 0 %d\r\n%s\r\n" % (key, MEBIBYTE - 1, b"x" * (MEBIBYTE - 1)), b"STORED\r\n")
        raw.send(b"get %s\r\n" % key * 30)
        time.sleep(0.1)
        raw.read(30 * (MEBIBYTE - 1))


# --- tests ----------------------------------------------------------------------------------------


def test_page_shows_what_happens():
    markup, hot = b"<b>x</b>", b"hammered"
    with Server(2, "--slow-log-threshold", "5ms") as server, browser(url(server)) as driver:
        until(lambda: state(driver) == "live", "the page is live")
        equal(driver.find_element(By.CSS_SELECTOR, "#operations-empty").is_displayed(), True, "nothing was asked for yet")
        equal(tile(driver, "Items"), "0", "items")
        fill(server, 1000)
        until(lambda: tile(driver, "Items") == "1.00 k", "the items are counted")
        with load(server.memcached, {hot: 5, markup: 3, **{b"user:%d" % n: 0.01 for n in range(1000)}}):
            until(lambda: tile(driver, "Requests/s").endswith(" k"), "thousands of requests are counted")
            until(lambda: shows(driver, "#operations td", "memcached"), "the protocol is listed")
            until(lambda: shows(driver, "#hot .key", hot.decode()), "the hot key is listed")
            until(lambda: shows(driver, "#hot .key", markup.decode()), "a key that looks like markup is shown as it is")
            equal(driver.find_elements(By.CSS_SELECTOR, "#hot b, #slow b"), [], "elements made of keys")
            # of both cores, as many as there are
            equal(len(driver.find_elements(By.CSS_SELECTOR, "#cores tbody tr")), 2, "cores")
            # lines are drawn, and go on
            line = "return document.querySelector(arguments[0]).getAttribute('d')"
            for chart in ("#rate path.line", "#latency path.line"):
                until(lambda: driver.find_elements(By.CSS_SELECTOR, chart), "a line is drawn")
                before = driver.execute_script(line, chart)
                until(lambda: driver.execute_script(line, chart) != before, f"{chart} goes on")
            until(lambda: tile(driver, "Latency, p99").endswith("s"), "a latency")
        until(lambda: not tile(driver, "Requests/s").endswith(" k"), "the requests end")
        be_slow(server)
        until(lambda: shows(driver, "#slow .key", "slow:one"), "the slow request is listed")

        # It asked nobody else for anything, and there was nothing to complain about.
        events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
        ours = {url(server) + name for name in ("", "page.css", "page.js", "events")}
        equal({address for address in asked if not address.startswith("data:")}, ours, "what the page asks for")
        equal(driver.get_log("browser"), [], "the browser's console")


def test_page_may_load_nothing_from_elsewhere():
    with Server(1) as server:
        connection = http.client.HTTPConnection(*server.addresses["http"], timeout=10)
        connection.request("GET", "/")
        answer = connection.getresponse()
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        connection.close()
        equal(policy["default-src"], "'none'")
        equal({name: policy[name] for name in ("script-src", "style-src", "connect-src")}, dict.fromkeys(("script-src", "style-src", "connect-src"), "'self'"))


def test_page_survives_a_restart():
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(2))
        driver = stack.enter_context(browser(url(server)))
        driver.execute_script("window.sameDocument = true")
        chart = "return document.querySelector('#rate path.line')?.getAttribute('d') ?? ''"
        with load(server.memcached, {b"before": 1}):
            until(lambda: shows(driver, "#operations td", "memcached"), "requests are shown")
            until(lambda: driver.execute_script(chart).startswith("M"), "a line is drawn")
        server.stop()
        until(lambda: state(driver) == "lost", "the page says that the server is gone")
        lost = driver.find_element(By.ID, "lost")
        equal((lost.is_displayed(), "does not answer; trying again" in lost.text), (True, True), f"what it says: {lost.text!r}")
        host, port = server.addresses["http"]
        again = Server(2)
        again.command[again.command.index("--http") + 1] = f"{host}:{port}"
        stack.enter_context(again)
        until(lambda: state(driver) == "live", "the page is live again")
        equal(lost.is_displayed(), False, "it still says that the server is gone")
        # What was drawn stays, and what is new stands apart from it.
        until(lambda: driver.execute_script(chart).count("M") == 2, "the line has a gap")
        # Totals began anew: nothing is less than nothing.
        until(lambda: tile(driver, "Requests/s") not in (None, "–"), "a rate")
        equal(tile(driver, "Requests/s").startswith(("-", "−")), False, "a negative rate")
        equal(driver.execute_script("return window.sameDocument"), True, "the document was not loaded again")


CONTRASTS = """
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => [r, g, b]
        .map((c) => c / 255).map((c) => (c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4))
        .reduce((sum, c, at) => sum + c * [.2126, .7152, .0722][at], 0);
    const surface = (element) => {
        for (; element; element = element.parentElement) {
            const colour = numbers(getComputedStyle(element).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const poor = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!own || !element.getClientRects().length) continue;
        const style = getComputedStyle(element);
        const text = luminance(numbers(element.namespaceURI.endsWith("svg") ? style.fill : style.color));
        const behind = luminance(surface(element));
        const contrast = (Math.max(text, behind) + .05) / (Math.min(text, behind) + .05);
        if (contrast < 4.5) poor.push(`${element.textContent.slice(0, 20)}: ${contrast.toFixed(2)}`);
    }
    return poor;
"""


def test_page_on_a_phone_and_in_the_dark():
    # Names as long as they may be, with and without places to break a line.
    long = {b"y" * 250: 3, b"a:" * 125: 2, b"short": 1}
    with Server(2, "--slow-log-threshold", "5ms") as server, browser(url(server), PHONE) as driver:
        with load(server.memcached, long):
            until(lambda: shows(driver, "#hot .key", "yyyy") and shows(driver, "#hot .key", "a:a:"), "long keys are listed")
        # Not before the load is over: on a busy machine it may fill the list.
        be_slow(server, b"z" * 250)
        until(lambda: shows(driver, "#slow .key", "zzzz"), "the slow request is listed")
        for width in (320, 360, 768, 1280):
            resize(driver, (width, 740))
            until(lambda: driver.execute_script("return innerWidth") == width, "the window's size")
            wide = driver.execute_script("return document.documentElement.scrollWidth")
            equal(wide <= width, True, f"at {width} pixels the page is {wide} wide")
        resize(driver, PHONE)
        lightness = {}
        for scheme in ("light", "dark"):
            # Without transitions, so that no colour is on its way.
            prefer(driver, scheme, "reduce")
            until(lambda: driver.execute_script("return matchMedia(`(prefers-color-scheme: ${arguments[0]})`).matches", scheme), scheme)
            colour = driver.execute_script("return getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number)")
            lightness[scheme] = sum(colour[:3]) / 3
            equal(driver.execute_script(CONTRASTS), [], f"text that is hard to read, {scheme}")
        equal((lightness["light"] > 200, lightness["dark"] < 60), (True, True), f"brightness of the page: {lightness}")


# --- the picture ----------------------------------------------------------------------------------


def picture(path):
    """Takes the picture of the page, after it has watched two minutes of load."""
    with Server(2, "--max-memory", "64m") as server, browser(url(server)) as driver, contextlib.ExitStack() as clients:
        fill(server, 200_000)
        users = {b"user:%d" % n: 10 / (n + 10) for n in range(0, 200_000, 40)}
        sessions = {b"session:%d" % n: 3 / (n + 1) for n in range(6)}
        missing = {b"missing:%d" % n: 0.05 for n in range(40)}
        clients.enter_context(load(server.memcached, users | sessions, clients=4, batch=50))
        clients.enter_context(load(server.memcached, users | missing, batch=20, writes=0))
        clients.enter_context(load(server.text, users, batch=20, writes=0))
        for _ in range(4):
            time.sleep(30)
            be_slow(server, b"report:today")
        height = driver.execute_script("return document.documentElement.scrollHeight")
        resize(driver, (DESKTOP[0], height))
        time.sleep(2)
        pathlib.Path(path).write_bytes(driver.get_screenshot_as_png())


if __name__ == "__main__":
    sys.exit(0 if attempt(f"picture {sys.argv[1]}", lambda: picture(sys.argv[1])) else 1)
