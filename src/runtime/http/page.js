// What the server does now. The server sends, once a second, its totals since it was started; everything per second here is a
// difference of two such reports. Nothing is asked of any other host, and text from clients is only ever set as text.
'use strict';
(() => {
  // How far back the charts reach, and how many reports that is.
  const HISTORY_S = 300;
  // A report must come each second. After so many the connection is dead, whatever it says of itself.
  const SILENCE_MS = 5000;
  const RETRY_MS = 1000;
  // Reports further apart than this say nothing of a moment: the line is interrupted.
  const APART_S = 10;
  const COLOURS = 8;
  const KINDS = [
    ['items', 'Items'], ['index', 'Index'], ['order', 'Order of eviction'], ['lingering', 'Being sent'],
    ['connections', 'Connections'], ['other', 'Everything else'], ['images', 'Snapshots'],
  ];
  const QUANTILES = [['p50', .5], ['p99', .99], ['p99.9', .999]];
  const NONE = '–';

  const $ = (id) => document.getElementById(id);

  // --- numbers as text ------------------------------------------------------------------------------

  // Three digits, as many as such a number is good for.
  const digits = (number) => number.toFixed(number >= 99.95 ? 0 : number >= 9.995 ? 1 : 2);
  // `plain` writes what needs no larger unit.
  function scaled(number, units, step, plain) {
    let unit = 0;
    while (unit < units.length - 1 && number >= step - .5) {
      number /= step;
      unit += 1;
    }
    return `${(unit === 0 ? plain ?? digits : digits)(number)} ${units[unit]}`.trim();
  }
  const whole = (number) => number.toFixed(0);
  const count = (number) => scaled(Math.round(number), ['', 'k', 'M', 'G', 'T'], 1000, whole);
  const perSecond = (number) => (number === null ? NONE : number > 0 && number < 9.95 ? number.toFixed(1) : count(number));
  const bytes = (number) => scaled(Math.round(number), ['B', 'KiB', 'MiB', 'GiB', 'TiB'], 1024, whole);
  const micros = (us) => (us === null ? NONE : us < .9995 && us > 0 ? `${whole(us * 1000)} ns` : scaled(us, ['µs', 'ms', 's'], 1000));
  // A number that somebody chose, such as a limit or a mark at an axis: without zeroes behind the point.
  const round = (text) => text.replace(/(\.\d*?)0+(?= |$)/, '$1').replace(/\.(?= |$)/, '');
  function percent(part, whole) {
    if (!(whole > 0)) return NONE;
    const share = (100 * part) / whole;
    // 100 % and 0 % are said only when it is all and nothing.
    if (part > 0 && share < .1) return '< 0.1 %';
    if (share > 99.9 && part < whole) return '> 99.9 %';
    return `${share >= 99.95 || share === 0 ? share.toFixed(0) : share.toFixed(1)} %`;
  }
  function span(seconds) {
    const [d, h, m, s] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60, Math.floor(seconds) % 60];
    return d ? `${d} d ${h} h` : h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
  }
  // Of the units, only the largest.
  const age = (seconds) => span(seconds).replace(/^(\d+ \w+) .*/, '$1');
  const plural = (number, one, many) => `${count(number)} ${number === 1 ? one : many}`;

  // --- small tools for the document -----------------------------------------------------------------

  function text(element, value) {
    value = String(value);
    if (element.textContent !== value) element.textContent = value;
  }
  function make(name, className, value) {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (value !== undefined) element.textContent = value;
    return element;
  }
  // So many children, each made once and then kept: what a reader has selected stays selected.
  function children(parent, number, build) {
    while (parent.children.length > number) parent.lastElementChild.remove();
    while (parent.children.length < number) parent.append(build(parent.children.length));
    return parent.children;
  }
  // Parts of a bar: [class, share of the whole bar, title].
  function bar(element, parts) {
    const pieces = children(element, parts.length, () => make('i'));
    parts.forEach(([className, share, title], at) => {
      const width = `${(100 * Math.min(1, Math.max(0, share || 0))).toFixed(3)}%`;
      if (pieces[at].className !== className) pieces[at].className = className;
      if (pieces[at].style.width !== width) pieces[at].style.width = width;
      if (title !== undefined && pieces[at].title !== title) pieces[at].title = title;
    });
  }
  // Rows of a table. A cell is what fills it: text, or a function that gets the cell.
  function rows(table, classes, data) {
    const body = table.tBodies[0];
    const lines = children(body, data.length, () => {
      const row = make('tr');
      for (const className of classes) row.append(make('td', className));
      return row;
    });
    data.forEach((cells, at) => cells.forEach((cell, column) => {
      const td = lines[at].cells[column];
      if (typeof cell === 'function') cell(td);
      else text(td, cell);
    }));
  }
  const meter = (parts) => (td) => {
    if (!td.firstElementChild) td.append(make('div', 'meter'));
    bar(td.firstElementChild, parts);
  };
  const named = (className, name) => (td) => {
    if (!td.firstElementChild) td.append(make('i', 'swatch'), make('span'));
    td.firstElementChild.className = `swatch ${className}`;
    text(td.lastElementChild, name);
  };
  // A key: its text, never markup.
  const key = (name) => (td) => {
    if (!td.firstElementChild) td.append(make('span'));
    text(td.firstElementChild, name);
    if (td.title !== name) td.title = name;
  };

  // --- from totals to rates -------------------------------------------------------------------------

  const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

  // What happened between two reports of the same connection, or null when they do not belong together: the counters were set
  // to zero, or too much time has passed.
  function difference(before, after) {
    const seconds = (after.uptime_ms - before.uptime_ms) / 1000;
    if (seconds <= 0 || seconds > APART_S) return null;
    const totals = {};
    for (const name of Object.keys(after.totals)) {
      totals[name] = after.totals[name] - before.totals[name];
      if (totals[name] < 0) return null;
    }
    const latencies = ({ latency }) => latency.local.map((number, at) => number + latency.forwarded[at]);
    const old = latencies(before);
    const latency = latencies(after).map((number, at) => number - old[at]);
    if (latency.some((number) => number < 0)) return null;
    const known = new Map(before.operations.map((operation) => [`${operation.protocol} ${operation.command}`, operation]));
    const operations = new Map(after.operations.map((operation) => {
      const name = `${operation.protocol} ${operation.command}`;
      return [name, (operation.count - (known.get(name)?.count ?? 0)) / seconds];
    }));
    const cores = after.cores.map((core, at) => {
      const was = before.cores[at];
      if (!was) return null;
      const [idle, time] = [core.idle_ns - was.idle_ns, core.uptime_ns - was.uptime_ns];
      const [requests, away, others] = ['requests', 'forwarded', 'served_for_others'].map((name) => Math.max(0, core[name] - was[name]) / seconds);
      return { busy: time > 0 ? Math.min(1, Math.max(0, 1 - idle / time)) : 0, own: Math.max(0, requests - away), requests, away, others };
    });
    return { seconds, totals, latency, operations, cores };
  }

  // The latency that this share of requests does not exceed. Within a bucket they are taken as spread evenly.
  function quantile(bounds, counts, share) {
    const all = sum(counts);
    if (all === 0) return null;
    let rank = share * all;
    for (let at = 0; at < counts.length; at += 1) {
      if (counts[at] > 0 && rank <= counts[at]) {
        if (at >= bounds.length) return bounds[bounds.length - 1];
        const low = at === 0 ? 0 : bounds[at - 1];
        return low + ((bounds[at] - low) * rank) / counts[at];
      }
      rank -= counts[at];
    }
    return bounds[bounds.length - 1];
  }

  // --- charts ---------------------------------------------------------------------------------------

  const SVG = 'http://www.w3.org/2000/svg';
  function draw(name, attributes, className, content) {
    const element = document.createElementNS(SVG, name);
    for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
    if (className) element.setAttribute('class', className);
    if (content !== undefined) element.textContent = content;
    return element;
  }

  // The next of 1, 2, 5, 10, 20, ...
  function roundUp(number) {
    const decade = 10 ** Math.floor(Math.log10(number));
    return decade * [1, 2, 5, 10].find((step) => step * decade >= number * .9999);
  }
  const linear = (values) => {
    const step = roundUp(Math.max(4, ...values) / 4);
    const top = step * Math.max(1, Math.ceil(Math.max(4, ...values) / step));
    return { at: (value) => value / top, marks: Array.from({ length: Math.round(top / step) + 1 }, (_, mark) => mark * step) };
  };
  const logarithmic = (values) => {
    const positive = values.filter((value) => value > 0);
    let low = Math.floor(Math.log10(Math.min(...positive)) + 1e-9);
    let high = Math.ceil(Math.log10(Math.max(...positive)) - 1e-9);
    if (!positive.length) [low, high] = [0, 3];
    if (high - low < 2) high = low + 2;
    return {
      at: (value) => (Math.log10(Math.max(value, 10 ** low)) - low) / (high - low),
      marks: Array.from({ length: high - low + 1 }, (_, decade) => 10 ** (low + decade)),
    };
  };

  // A sample is { t: seconds, values: [number or null, ...] }; values of null are a gap.
  class Chart {
    constructor(id, names, options) {
      this.box = $(id);
      this.names = names;
      this.options = options;
      this.samples = [];
      this.pointed = null;
      this.svg = draw('svg', { role: 'img' });
      this.waiting = make('p', 'waiting');
      this.box.append(this.svg, this.waiting);
      this.legend = names.map((name, at) => {
        const item = make('li');
        const value = make('b', '', NONE);
        item.append(make('i', `swatch s${at}`), make('span', '', name), value);
        return [item, value];
      });
      this.when = make('li');
      $(`${id}-legend`).append(this.when, ...this.legend.map(([item]) => item));
      new ResizeObserver(() => this.paint()).observe(this.box);
      this.svg.addEventListener('pointermove', (event) => this.point(event));
      this.svg.addEventListener('pointerdown', (event) => this.point(event));
      this.svg.addEventListener('pointerleave', () => this.point(null));
    }

    add(t, values) {
      this.samples.push({ t, values });
      while (this.samples.length && this.samples[0].t < t - HISTORY_S - 1) this.samples.shift();
      this.paint();
    }

    // A gap, unless there is one.
    interrupt(t) {
      const last = this.samples[this.samples.length - 1];
      if (last && last.values.some((value) => value !== null)) this.add(t, this.names.map(() => null));
    }

    point(event) {
      this.pointed = event && event.clientX - this.box.getBoundingClientRect().left;
      this.paint();
    }

    paint() {
      if (document.hidden) return;
      const { width, height } = this.box.getBoundingClientRect();
      const { samples, options } = this;
      if (width < 80 || !samples.length) {
        text(this.waiting, 'The first line takes two seconds.');
        return;
      }
      const seen = samples.flatMap(({ values }) => values.filter((value) => value !== null));
      text(this.waiting, seen.length ? '' : options.empty);
      const end = samples[samples.length - 1].t;
      const length = end - samples[0].t;
      const reach = [60, 120, HISTORY_S].find((seconds) => length <= seconds) ?? HISTORY_S;
      const scale = options.scale(seen);
      const [left, right, top, bottom] = [options.margin, width - 6, 8, height - 22];
      const x = (t) => right - ((end - t) / reach) * (right - left);
      const y = (value) => bottom - scale.at(value) * (bottom - top);
      const parts = [];
      // Not more marks than there is room for.
      const every = Math.ceil(scale.marks.length / Math.max(2, Math.floor((bottom - top) / 26)));
      scale.marks.forEach((mark, at) => {
        if (at % every) return;
        const level = Math.round(y(mark)) + .5;
        parts.push(draw('line', { x1: left, x2: right, y1: level, y2: level }, 'grid'));
        parts.push(draw('text', { x: left - 7, y: level + 4, 'text-anchor': 'end' }, 'label', round(options.format(mark))));
      });
      const steps = reach === HISTORY_S ? 5 : width < 420 ? 2 : 4;
      for (let step = 0; step <= steps; step += 1) {
        const ago = (reach * (steps - step)) / steps;
        const label = ago === 0 ? 'now' : ago % 60 ? `${ago} s` : `${ago / 60} min`;
        const anchor = step === 0 ? 'start' : step === steps ? 'end' : 'middle';
        parts.push(draw('text', { x: x(end - ago), y: height - 5, 'text-anchor': anchor }, 'label', ago ? `−${label}` : label));
      }
      this.names.forEach((_, series) => {
        const [line, area] = path(samples.map(({ t, values }) => [x(t), values[series] === null ? null : y(values[series])]), bottom);
        if (options.area) parts.push(draw('path', { d: area }, `area s${series}`));
        parts.push(draw('path', { d: line }, `line s${series}`));
      });
      const shown = this.shown(x);
      if (this.pointed !== null) {
        const at = Math.round(x(shown.t)) + .5;
        parts.push(draw('line', { x1: at, x2: at, y1: top, y2: bottom }, 'cursor'));
      }
      // The whole box takes part in pointing.
      parts.push(draw('rect', { x: 0, y: 0, width, height, fill: 'transparent' }));
      this.svg.replaceChildren(...parts);
      text(this.when, this.pointed === null ? '' : `${span(end - shown.t)} ago`);
      this.legend.forEach(([, value], at) => text(value, options.format(shown.values[at])));
      const now = samples[samples.length - 1].values;
      this.svg.setAttribute('aria-label', `${options.title}: ${this.names.map((name, at) => `${name} ${options.format(now[at])}`).join(', ')}`);
    }

    // The sample whose numbers stand in the legend: the one pointed at, or the last.
    shown(x) {
      const { samples, pointed } = this;
      if (pointed === null) return samples[samples.length - 1];
      return samples.reduce((best, sample) => (Math.abs(x(sample.t) - pointed) < Math.abs(x(best.t) - pointed) ? sample : best));
    }
  }

  // The lines through points, and the areas under them; interrupted where a point has no height.
  function path(points, floor) {
    const runs = [];
    let run = null;
    for (const point of points) {
      if (point[1] === null) run = null;
      else if (run) run.push(point);
      else runs.push(run = [point]);
    }
    const join = (part) => part.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join('L');
    // A point alone becomes a dot: a line of no length with round ends.
    const line = runs.map((part) => `M${join(part.length > 1 ? part : [part[0], part[0]])}`).join('');
    const area = runs.map((part) => `M${part[0][0].toFixed(1)} ${floor}L${join(part)}L${part[part.length - 1][0].toFixed(1)} ${floor}Z`).join('');
    return [line, area];
  }

  const rateChart = new Chart('rate', ['answered'], {
    title: 'Requests per second', scale: linear, format: perSecond, margin: 46, area: true, empty: '',
  });
  const latencyChart = new Chart('latency', QUANTILES.map(([name]) => name), {
    title: 'Latency', scale: logarithmic, format: micros, margin: 52, empty: 'No request was answered yet.',
  });

  // --- the parts of the page ------------------------------------------------------------------------

  function logTile({ log, now_ms }, written) {
    if (log.failed) return ['Log', 'failed', 'writes are refused'];
    const snapshot = log.snapshot_at_ms ? `snapshot ${age(Math.max(0, (now_ms - log.snapshot_at_ms) / 1000))} ago` : 'no snapshot yet';
    return ['Log', written, log.snapshots_failed ? 'the last snapshot failed' : snapshot];
  }

  function tiles(report, change) {
    const { totals, memory } = report;
    const rate = (name) => (change ? change.totals[name] / change.seconds : null);
    const used = sum(KINDS.map(([kind]) => memory.kinds[kind]));
    const reads = change ? change.totals.hits + change.totals.misses : 0;
    const forwarded = change && change.totals.requests ? `${percent(change.totals.forwarded, change.totals.requests)} forwarded` : '';
    const latency = (share) => change && quantile(report.latency.bounds_us, change.latency, share);
    const flow = (name) => (change ? `${bytes(rate(name))}/s` : NONE);
    const list = [
      ['Requests/s', perSecond(rate('requests')), forwarded || `${count(totals.requests)} in all`],
      ['Latency, p99', micros(latency(.99)), change ? `p50 ${micros(latency(.5))}` : ''],
      ['Hit ratio', percent(change?.totals.hits ?? 0, reads), totals.hits + totals.misses ? `${percent(totals.hits, totals.hits + totals.misses)} in all` : ''],
      ['Items', count(report.items), `${perSecond(rate('expired'))} expire/s`],
      ['Memory', bytes(used), `${percent(used, memory.limit)} of the limit`],
      ['Evictions/s', perSecond(rate('evictions')), totals.out_of_memory ? `${count(totals.out_of_memory)} writes refused` : `${count(totals.evictions)} in all`],
      ['Connections', count(report.connections), `${perSecond(rate('connections_opened'))} new/s`],
      ['Network in', flow('bytes_received'), `out ${flow('bytes_sent')}`],
    ];
    // Only a server with a data directory has one.
    if (report.log) list.push(logTile(report, flow('log_bytes')));
    const boxes = children($('tiles'), list.length, () => {
      const box = make('div');
      box.append(make('dt'), make('dd', 'value'), make('dd', 'more'));
      return box;
    });
    list.forEach(([name, value, more], at) => {
      const [term, first, second] = boxes[at].children;
      text(term, name);
      const [, number, unit] = /^(.*?\d|[^\d]+)(?: ([^\d]+))?$/.exec(value) ?? [null, value, undefined];
      if (first.dataset.value !== value) {
        first.dataset.value = value;
        first.replaceChildren(number);
        if (unit) first.append(' ', make('small', '', unit));
      }
      text(second, more);
    });
  }

  function cores(report, change) {
    const most = Math.max(1, ...(change?.cores ?? []).map((core) => (core ? core.own + core.away + core.others : 0)));
    rows($('cores'), ['', 'number', 'bar', 'number', 'bar', 'number wide', 'number wide', 'number wide', 'number wide'], report.cores.map((core, at) => {
      const load = change?.cores[at] ?? null;
      return [
        core.core,
        load ? percent(load.busy, 1) : NONE,
        meter(load ? [['busy', load.busy]] : []),
        load ? perSecond(load.requests) : NONE,
        meter(load ? [['own', load.own / most], ['away', load.away / most], ['others', load.others / most]] : []),
        load ? percent(load.away, load.requests) : NONE,
        count(core.items),
        bytes(core.charged),
        count(core.connections),
      ];
    }));
  }

  function memory(report) {
    const { limit, kinds, payload, resident } = report.memory;
    const used = sum(KINDS.map(([kind]) => kinds[kind]));
    text($('memory-sum'), `${bytes(used)} of ${round(bytes(limit))}`);
    bar($('memory-bar'), KINDS.map(([kind, name], at) => [`kind-${at}`, kinds[kind] / limit, `${name}: ${bytes(kinds[kind])}`]));
    $('memory-bar').setAttribute('aria-label', `${percent(used, limit)} of the memory limit is in use`);
    rows($('memory'), ['', 'number', 'number'], KINDS.map(([kind, name], at) => [named(`kind-${at}`, name), bytes(kinds[kind]), percent(kinds[kind], limit)]));
    const notes = [`The process has ${bytes(resident)} resident.`];
    if (report.items) {
      const extra = (kinds.items + kinds.index + kinds.order - payload) / report.items;
      notes.unshift(`Keys and values are ${bytes(payload)}; an item takes ${digits(Math.max(0, extra))} B beside them.`);
    }
    text($('memory-note'), notes.join(' '));
  }

  // Where on the line a range begins, from 0 to 1. The first 52 bits are as much as a number holds.
  const position = (start) => parseInt(start.slice(0, 13), 16) / 2 ** 52;
  // Partitioned by order, a range begins with the first bytes of a key.
  const asKey = (start) => start.match(/../g).map((pair) => parseInt(pair, 16)).map((byte) => (byte > 32 && byte < 127 ? String.fromCharCode(byte) : '·')).join('').replace(/·+$/, '');

  function ranges(report, change) {
    const list = report.ranges;
    const ordered = report.partitioning === 'ordered';
    const bounds = list.map(({ start }, at) => (ordered ? at / list.length : position(start)));
    const shares = list.map((_, at) => (bounds[at + 1] ?? 1) - bounds[at]);
    bar($('ranges'), list.map(({ start, core }, at) => [
      `core-${core % COLOURS}`, shares[at], `core ${core}, from ${ordered ? `${asKey(start) || 'the first key'} (${start})` : start}`,
    ]));
    const owned = report.cores.map(({ core }) => sum(list.map((range, at) => (range.core === core ? shares[at] : 0))));
    const labels = list.length <= 24 ? list : [];
    const scale = children($('ranges-scale'), labels.length, () => make('span'));
    labels.forEach(({ core }, at) => {
      text(scale[at], core);
      scale[at].style.width = `${100 * shares[at]}%`;
    });
    text($('ranges-sum'), `${plural(list.length, 'range', 'ranges')}, ${ordered ? 'keys in order, drawn equally wide' : 'by the hash of the key'}`);
    $('ranges').setAttribute('aria-label', `${plural(list.length, 'range', 'ranges')} of keys on ${plural(report.cores.length, 'core', 'cores')}`);
    const work = (change?.cores ?? []).map((core) => (core ? core.own + core.others : 0));
    rows($('owners'), ['', 'number', 'number', 'number'], report.cores.map((core, at) => [
      named(`core-${core.core % COLOURS}`, `core ${core.core}`),
      ordered ? count(list.filter((range) => range.core === core.core).length) : percent(owned[at], 1),
      percent(core.items, report.items),
      percent(work[at] ?? 0, sum(work)),
    ]));
  }

  function operations(report, change) {
    const list = report.operations.filter((operation) => operation.count > 0);
    $('operations').hidden = !list.length;
    $('operations-empty').hidden = list.length > 0;
    rows($('operations'), ['', '', 'number', 'number', 'number wide'], list.map((operation) => [
      operation.protocol,
      operation.command,
      perSecond(change ? change.operations.get(`${operation.protocol} ${operation.command}`) : null),
      operation.misses === undefined ? '' : percent(operation.misses, operation.count),
      count(operation.count),
    ]));
  }

  function hotKeys(report) {
    const list = report.hot_keys;
    const most = Math.max(1, ...list.map((hot) => hot.per_second));
    for (const id of ['hot', 'hot-legend']) $(id).hidden = !list.length;
    $('hot-empty').hidden = list.length > 0;
    rows($('hot'), ['key', 'bar', 'number', 'number', 'number wide'], list.map((hot) => [
      key(hot.key),
      meter([
        ['reads', (hot.per_second - hot.writes_per_second) / most, `reads: ${perSecond(hot.per_second - hot.writes_per_second)}/s`],
        ['writes', hot.writes_per_second / most, `writes: ${perSecond(hot.writes_per_second)}/s`],
      ]),
      perSecond(hot.per_second),
      percent(hot.share, 1),
      hot.core,
    ]));
  }

  const STAGES = ['queue', 'hop', 'execute', 'flush'];
  function slowLog(report) {
    const list = report.slow_log;
    const total = (slow) => sum(STAGES.map((stage) => slow[`${stage}_us`]));
    const most = Math.max(1, ...list.map(total));
    for (const id of ['slow', 'slow-legend']) $(id).hidden = !list.length;
    $('slow-empty').hidden = list.length > 0;
    text($('slow-sum'), report.slow_threshold_us ? `longer than ${round(micros(report.slow_threshold_us))}` : 'not recorded: the threshold is 0');
    rows($('slow'), ['', '', 'key', 'number', 'bar', 'number wide', 'number wide', 'number wide', 'number wide', 'wide', 'number wide'], list.map((slow) => [
      `${age(Math.max(0, (report.now_ms - slow.at_ms) / 1000))} ago`,
      `${slow.protocol} ${slow.command}${slow.requests > 1 ? ` ×${slow.requests}` : ''}`,
      key(slow.key),
      round(micros(total(slow))),
      meter(STAGES.map((stage) => [stage, slow[`${stage}_us`] / most, `${stage}: ${round(micros(slow[`${stage}_us`]))}`])),
      ...STAGES.map((stage) => round(micros(slow[`${stage}_us`]))),
      slow.client,
      slow.core,
    ]));
  }

  // --- the stream of reports ------------------------------------------------------------------------

  let last = null;
  // Another connection may be one to another process, whose totals began anew.
  let connected = false;
  let lastChange = null;
  let lastAt = 0;

  // Seconds of this page's own clock, which neither a restart of the server nor a change of the time moves.
  const clock = () => performance.now() / 1000;

  function paint() {
    if (document.hidden || !last) return;
    const report = last;
    const about = [`version ${report.version}`, `up ${span(report.uptime_ms / 1000)}`, plural(report.cores.length, 'core', 'cores')];
    text($('about'), about.join(' · '));
    tiles(report, lastChange);
    cores(report, lastChange);
    memory(report);
    ranges(report, lastChange);
    operations(report, lastChange);
    hotKeys(report);
    slowLog(report);
  }

  function received(report) {
    const now = clock();
    lastChange = connected ? difference(last, report) : null;
    connected = true;
    last = report;
    lastAt = now;
    if (lastChange) {
      rateChart.add(now, [lastChange.totals.requests / lastChange.seconds]);
      latencyChart.add(now, QUANTILES.map(([, share]) => quantile(report.latency.bounds_us, lastChange.latency, share)));
    } else {
      rateChart.interrupt(now);
      latencyChart.interrupt(now);
    }
    state('live');
    paint();
  }

  const STATES = { waiting: 'connecting', live: 'live', lost: 'no connection' };
  function state(name) {
    if (name !== 'live') connected = false;
    const element = $('state');
    if (element.dataset.state !== name) {
      element.dataset.state = name;
      text(element, STATES[name]);
    }
    $('main').classList.toggle('stale', name === 'lost');
    $('lost').hidden = name !== 'lost';
    if (name !== 'lost') return;
    const since = last ? ` What is shown is ${span(clock() - lastAt)} old.` : '';
    text($('lost'), `The server does not answer; trying again.${since}`);
    rateChart.interrupt(clock());
    latencyChart.interrupt(clock());
  }

  let source = null;
  let openedAt = 0;

  function open() {
    source?.close();
    connected = false;
    openedAt = clock();
    source = new EventSource('events');
    source.addEventListener('open', () => {
      connected = false;
    });
    source.addEventListener('message', (event) => received(JSON.parse(event.data)));
    source.addEventListener('error', () => state('lost'));
  }

  // A browser tries again by itself after most failures, but not after an answer that is none, and it does not see a
  // connection that has died without a word.
  setInterval(() => {
    const silent = (clock() - Math.max(lastAt, openedAt)) * 1000;
    if (silent > SILENCE_MS || (source.readyState === EventSource.CLOSED && silent > RETRY_MS)) {
      state('lost');
      open();
    } else if ($('state').dataset.state === 'lost') {
      state('lost');
    }
  }, 1000);

  document.addEventListener('visibilitychange', () => {
    paint();
    rateChart.paint();
    latencyChart.paint();
  });
  open();
})();
