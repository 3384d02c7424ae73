"""/metrics, read by Prometheus' own parsers: of its text format and of OpenMetrics.

A parser accepts more than is right, so what it has read is checked: names, labels, histograms, and that the numbers are
those of what was done before.
"""

import contextlib
import re
import urllib.error
import urllib.request

import prometheus_client.openmetrics.parser
import prometheus_client.parser

from support import Raw, Server, client, equal, on_cores

TEXT = "text/plain; version=0.0.4"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"
PARSERS = {
    TEXT: prometheus_client.parser.text_string_to_metric_families,
    OPEN_METRICS: prometheus_client.openmetrics.parser.text_string_to_metric_families,
}
KEYS = [f"key-{n}" for n in range(50)]


class Scrape:
    """What one answer says: by a sample's name, its labels and its value."""

    def __init__(self, text, accept):
        self.text, self.families, self.samples = text, {}, {}
        for family in PARSERS[accept](text):
            if family.name in self.families:
                raise AssertionError(f"{family.name} is there twice")
            if not family.documentation:
                raise AssertionError(f"{family.name} is not explained")
            self.families[family.name] = family
            for sample in family.samples:
                of_name = self.samples.setdefault(sample.name, {})
                labels = frozenset(sample.labels.items())
                if labels in of_name:
                    raise AssertionError(f"{sample} is there twice")
                of_name[labels] = sample.value

    def sum(self, name, **labels):
        """The sum of all series that have these labels. A series that counts nothing may be missing, its name not."""
        if name.removesuffix("_total") not in self.families and name not in self.samples:
            raise AssertionError(f"there is no {name}")
        return sum(value for of, value in self.samples.get(name, {}).items() if labels.items() <= dict(of).items())


def scrape(server, accept=TEXT):
    host, port = server.http
    request = urllib.request.Request(f"http://{host}:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        kind = answer.headers["Content-Type"]
        equal([part.strip() for part in kind.split(";")][:2], accept.split("; "), "Content-Type")
        return Scrape(answer.read().decode(), accept)


def check_conventions(scraped):
    """What Prometheus' conventions ask of names and kinds."""
    for family in scraped.families.values():
        if not re.fullmatch(r"(memkv|process)_[a-z][a-z0-9_]*", family.name):
            raise AssertionError(f"an odd name: {family.name}")
        if re.search(r"_(ns|us|ms|milliseconds|kb|mb)(_|$)", family.name):
            raise AssertionError(f"not in base units: {family.name}")
        for sample in family.samples:
            if family.type == "counter" and not sample.name.endswith("_total"):
                raise AssertionError(f"a counter without _total: {sample}")
            if family.type != "gauge" and sample.value < 0:
                raise AssertionError(f"a negative count: {sample}")


def check_histograms(scraped):
    """Each series of each histogram rises with its bounds, and ends with the count of all."""
    seen = 0
    for family in scraped.families.values():
        if family.type != "histogram":
            continue
        buckets = {}
        for labels, value in scraped.samples.get(f"{family.name}_bucket", {}).items():
            of = dict(labels)
            buckets.setdefault(frozenset((labels - {("le", of["le"])})), []).append((float(of["le"]), value))
        for labels, series in buckets.items():
            bounds, counts = zip(*series)
            equal(list(bounds), sorted(bounds), f"{family.name}: bounds in order")
            equal(list(counts), sorted(counts), f"{family.name}: cumulative")
            equal(bounds[-1], float("inf"))
            equal(counts[-1], scraped.samples[f"{family.name}_count"][labels], family.name)
            total = scraped.samples[f"{family.name}_sum"][labels]
            # all that is in a bucket is longer than the bound before it, and not longer than its own
            between = [count - before for count, before in zip(counts, (0, *counts))]
            lowest = sum(count * bound for count, bound in zip(between, (0, *bounds)))
            highest = sum(count * bound for count, bound in zip(between, bounds) if count)
            if not lowest <= total + 1e-9 or not total <= highest + 1e-9:
                raise AssertionError(f"{family.name}{dict(labels)}: a sum of {total}, not {lowest} to {highest}")
            seen += 1
    if not seen:
        raise AssertionError("there is no histogram")


@on_cores(1, 2)
def test_both_formats_of_metrics_are_what_they_say(cores):
    with Server(cores) as server:
        client(server).set("key", "value")
        for accept in PARSERS:
            scraped = scrape(server, accept)
            equal(scraped.text.endswith("\n# EOF\n"), accept == OPEN_METRICS, "# EOF")
            check_conventions(scraped)
            check_histograms(scraped)
            equal(scraped.sum("memkv_items"), 1)
        classic, modern = (scrape(server, accept) for accept in PARSERS)
        # what the two parsers call a counter's family differs; the series are the same, but for those that scrapes begin
        series = lambda of: {labels for labels in of if ("command", "other") not in labels}
        # and which keys are hot is as of the moment
        passing = "memkv_hot_key_requests_per_second"
        names = [{name: series(of) for name, of in scraped.samples.items() if name != passing} for scraped in (classic, modern)]
        equal(names[0], names[1])
        units = {name: family.unit for name, family in modern.families.items() if family.unit}
        equal(units["memkv_request_duration_seconds"], "seconds")
        equal(units["memkv_memory_bytes"], "bytes")


def test_a_scraper_that_takes_anything_gets_the_text_format():
    with Server(1) as server:
        host, port = server.http
        for headers in ({}, {"Accept": "*/*"}, {"Accept": "text/html"}):
            request = urllib.request.Request(f"http://{host}:{port}/metrics", headers=headers)
            with urllib.request.urlopen(request, timeout=10) as answer:
                equal(answer.headers["Content-Type"].startswith(TEXT), True, answer.headers["Content-Type"])
                Scrape(answer.read().decode(), TEXT)
        # as Prometheus asks
        both = f"{OPEN_METRICS};q=0.75,{TEXT};q=0.5,*/*;q=0.1"
        request = urllib.request.Request(f"http://{host}:{port}/metrics", headers={"Accept": both})
        with urllib.request.urlopen(request, timeout=10) as answer:
            equal(answer.headers["Content-Type"].startswith(OPEN_METRICS), True, answer.headers["Content-Type"])
            Scrape(answer.read().decode(), OPEN_METRICS)


@on_cores(1, 2)
def test_metrics_count_what_was_done(cores):
    with Server(cores) as server:
        mc = client(server)
        for key in KEYS:
            mc.set(key, "value")
            equal(mc.add(key, "other"), False)
            equal(mc.get(key), b"value")
            equal(mc.get(f"no-{key}"), None)
            mc.delete(key)
        mc.set("kept", "x" * 1000)
        with Raw(server.text) as raw:
            raw.ask(b"get kept\r\nget nothing\r\nwhat\r\n", b"VALUE kept 1000 \r\n" + b"x" * 1000 + b"\r\nEND\r\nVALUE nothing 0 \r\n\r\nEND\r\nINVALID REQUEST\r\n")
        for accept in PARSERS:
            scraped = scrape(server, accept)
            operations = lambda **labels: scraped.sum("memkv_operations_total", **labels)
            memcached = lambda command, outcome: operations(protocol="memcached", command=command, outcome=outcome)
            equal(memcached("set", "done"), len(KEYS) + 1)
            equal(memcached("set", "condition_failed"), len(KEYS))
            equal(memcached("get", "done"), len(KEYS))
            equal(memcached("get", "not_found"), len(KEYS))
            equal(memcached("delete", "done"), len(KEYS))
            equal(operations(protocol="memcached"), 5 * len(KEYS) + 1)
            equal(operations(protocol="text", outcome="done"), 1)
            equal(operations(protocol="text", outcome="not_found"), 1)
            equal(scraped.sum("memkv_bad_requests_total", protocol="text"), 1)
            equal(scraped.sum("memkv_bad_requests_total"), 1)
            equal(scraped.sum("memkv_lookups_total", command="get", result="hit"), len(KEYS) + 1)
            equal(scraped.sum("memkv_lookups_total", command="get", result="miss"), len(KEYS) + 1)
            equal(scraped.sum("memkv_items"), 1)
            equal(scraped.sum("memkv_payload_bytes"), len("kept") + 1000)
            equal(scraped.sum("memkv_request_duration_seconds_count", command="delete"), len(KEYS))
            forwarded = operations(path="forwarded")
            equal(forwarded > 0, cores > 1, "some keys belong to another core")
            equal(operations(path="local") + forwarded, operations())
            equal(scraped.sum("memkv_requests_served_for_others_total") > 0, cores > 1)
            equal({dict(of)["core"] for of in scraped.samples["memkv_items"]}, {str(core) for core in range(cores)})
        # what memcached's own statistics say at the same time
        stats = mc.stats()
        equal(scraped.sum("memkv_memory_limit_bytes"), stats[b"limit_maxbytes"])
        equal(scraped.sum("memkv_items_written_total"), stats[b"total_items"])
        equal(scraped.sum("memkv_connection_attempts_total", outcome="accepted") > 0, True)
        # pymemcache makes no number of it
        equal(scraped.sum("process_resident_memory_bytes") > 1 << 20, True)


@on_cores(1, 2)
def test_counters_never_go_down(cores):
    with Server(cores) as server, contextlib.ExitStack() as stack:
        # HTTP connections may be anywhere; so are these
        clients = [client(server) for _ in range(4)]
        for mc in clients:
            stack.callback(mc.close)
        before = {}
        for round in range(12):
            for number, mc in enumerate(clients):
                mc.set(f"{round}-{number}", "value")
                mc.get(f"{round}-{number + 1}")
            scraped = scrape(server, list(PARSERS)[round % 2])
            now = {}
            for family in scraped.families.values():
                if family.type in ("counter", "histogram"):
                    for sample in family.samples:
                        now[sample.name, frozenset(sample.labels.items())] = sample.value
            for series, value in before.items():
                if series not in now:
                    raise AssertionError(f"{series} is gone")
                if now[series] < value:
                    raise AssertionError(f"{series} fell from {value} to {now[series]}")
            before = now
        equal(scraped.sum("memkv_operations_total", protocol="memcached", command="set"), 12 * len(clients))


def test_memory_by_kind_is_all_there_is():
    with Server(2) as server:
        mc = client(server)
        for n in range(20):
            mc.set(f"large-{n}", b"x" * 500_000)
        scraped = scrape(server)
        kinds = {dict(labels)["kind"] for labels in scraped.samples["memkv_memory_bytes"]}
        equal(kinds, {"items", "index", "order", "images", "lingering", "connections", "transit", "other"})
        equal(scraped.sum("memkv_memory_bytes", kind="items") >= 20 * 500_000, True)
        other = scraped.sum("memkv_memory_bytes", kind="other")
        equal(scraped.sum("memkv_memory_bytes") - other, scraped.sum("memkv_memory_charged_bytes"))
