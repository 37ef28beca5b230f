// Quality against what it costs: bytes, and decoding speed.

const MEASURES = {
  score: { label: "score, %", more: true, scale: 100 },
  perplexity: { label: "perplexity", more: false, log: true },
  nll: { label: "NLL, nats per token", more: false },
  kl: { label: "KL to the full cache, nats per token", more: false },
  top1: { label: "top-1 agreement, %", more: true, scale: 100 },
};
const COSTS = {
  nbytes: { label: "cache, MB", more: false, scale: 1e-6, name: "bytes" },
  decode_tokens_per_s: { label: "decoding, tokens per second", more: true, scale: 1, name: "speed" },
};
const better = (more) => (more ? "more is better" : "less is better");

function measures() {
  const rows = board();
  return Object.keys(MEASURES).filter((key) => rows.some((row) => given(row[COLUMN[key]])));
}
const measure = () => (measures().includes(state.y) ? state.y : measures()[0]);

function startPareto() {
  const host = byId("pareto-figures");
  for (const key of Object.keys(COSTS)) {
    const caption = () => `${capital(MEASURES[measure()]?.label.split(",")[0] ?? "")} against ${key === "nbytes" ? "bytes" : "decoding speed"}`;
    figure(host, `pareto-${COSTS[key].name}`, caption, (width) => scatter(width, key, measure()));
  }
}

function drawParetoChoices() {
  chooseAnew(byId("pareto-choices"), "Quality", "y", measures().map((key) => [key, MEASURES[key].label]));
}
const capital = (text) => text[0]?.toUpperCase() + text.slice(1);

// Indices of the points that no other beats, in the order of x.
function front(points, x, y) {
  const order = points.map((_, i) => i).sort((a, b) => (x.more ? -1 : 1) * (points[a].x - points[b].x) || (y.more ? -1 : 1) * (points[a].y - points[b].y));
  const out = [];
  for (const i of order) {
    const last = out.length ? points[out[out.length - 1]].y : null;
    if (last === null || (y.more ? points[i].y > last : points[i].y < last)) out.push(i);
  }
  return out;
}

function ticks(low, high, number, log) {
  if (log && high / low > 12) {
    const out = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
      for (const step of high / low > 500 ? [1] : [1, 2, 5]) {
        const at = step * 10 ** e;
        if (at >= low * 0.999 && at <= high * 1.001) out.push(at);
      }
    }
    return out;
  }
  const raw = (high - low) / number;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find((s) => s * power >= raw);
  const out = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) out.push(Number(at.toPrecision(10)));
  return out;
}

function axis(values, pixels, { log, pad = 0.08, limits = [-Infinity, Infinity] }) {
  const f = log ? Math.log : (v) => v;
  const back = log ? Math.exp : (v) => v;
  let [low, high] = [Math.min(...values), Math.max(...values)].map(f);
  const room = (high - low || (log ? 0.4 : Math.abs(high) * 0.1 || 0.1)) * pad;
  [low, high] = [Math.max(low - room, f(limits[0]) || -Infinity), Math.min(high + room * (pad > 0.3 ? 0.6 : 1), limits[1])];
  if (log && !Number.isFinite(low)) low = f(Math.min(...values)) - room;
  const [from, to] = pixels;
  const place = (v) => from + ((f(v) - low) / (high - low)) * (to - from);
  return { place, low: back(low), high: back(high) };
}

function scatter(width, costKey, qualityKey) {
  const [x, y] = [COSTS[costKey], MEASURES[qualityKey]];
  if (!y) return null;
  const rows = board().filter((row) => shows(row[0]) && given(row[COLUMN[costKey]]) && given(row[COLUMN[qualityKey]]));
  if (!rows.length) return null;
  const scale = y.scale ?? 1;
  const least = Math.min(...rows.map((row) => row[COLUMN[qualityKey]]).filter((v) => v > 0)) / 2 || 1e-9;
  const points = rows.map((row) => ({
    row,
    name: POLICIES[row[0]].name,
    x: row[COLUMN[costKey]] * x.scale,
    y: Math.max(row[COLUMN[qualityKey]], y.log ? least : -Infinity) * scale,
  }));
  const height = Math.round(Math.max(300, Math.min(430, width * 0.82)));
  const [left, right, top, bottom] = [46, width - 8, 12, height - 42];
  const xs = axis(points.map((p) => p.x), [left + 8, right - 8], { log: true, pad: 0.14 });
  const ends = y.scale ? [-4, 104] : [-Infinity, Infinity];
  const ys = axis(points.map((p) => p.y), [bottom - 6, top + 6], { log: y.log, pad: 0.1, limits: ends });
  for (const p of points) [p.px, p.py] = [xs.place(p.x), ys.place(p.y)];
  const best = front(points, x, y);

  const grid = [];
  for (const at of ticks(xs.low, xs.high, width / 90, true)) {
    grid.push(svg("line", { class: "grid", x1: xs.place(at), x2: xs.place(at), y1: top, y2: bottom }));
    grid.push(svg("text", { class: "dim", x: xs.place(at), y: bottom + 16, "text-anchor": "middle" }, String(Number(at.toPrecision(3)))));
  }
  for (const at of ticks(ys.low, ys.high, 6, y.log)) {
    grid.push(svg("line", { class: "grid", x1: left, x2: right, y1: ys.place(at), y2: ys.place(at) }));
    grid.push(svg("text", { class: "dim", x: left - 7, y: ys.place(at) + 4, "text-anchor": "end" }, String(Number(at.toPrecision(3)))));
  }
  grid.push(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  grid.push(svg("text", { class: "dim", x: right, y: height - 8, "text-anchor": "end" }, `${x.label} (${better(x.more)})`));

  const line = best.map((i, n) => (n === 0 ? `M${points[i].px},${points[i].py}` : `H${points[i].px}V${points[i].py}`)).join("");
  const labels = placeLabels(points, best, [left, top, right, bottom]);
  const dots = points.map((p, i) => dot(p, best.includes(i), qualityKey, scale, ys));
  roving(dots, points);
  const about = `${y.label} against ${x.label} of ${points.length} policies. Not beaten: ${best.map((i) => points[i].name).join(", ")}.`;
  return svg(
    "svg",
    { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": about },
    grid,
    svg("path", { class: "front", d: line }),
    labels,
    dots,
  );
}

function dot(p, isBest, qualityKey, scale, ys) {
  const { row } = p;
  const node = svg("g", { class: isBest ? "dot best" : "dot", role: "img", tabindex: "-1" });
  const hasInterval = qualityKey === "score" && given(row[COLUMN.low]);
  if (hasInterval) {
    const [low, high] = [row[COLUMN.low], row[COLUMN.high]].map((v) => ys.place(v * scale));
    node.append(svg("line", { class: "whisker", x1: p.px, x2: p.px, y1: low, y2: high }));
  }
  node.append(svg("circle", { class: "ring", cx: p.px, cy: p.py, r: 9 }), svg("circle", { cx: p.px, cy: p.py, r: isBest ? 5.5 : 4.8 }));
  const quality = MEASURES[qualityKey];
  const shown = qualityKey === "score" || qualityKey === "top1" ? percent(row[COLUMN[qualityKey]]) : digits(row[COLUMN[qualityKey]]);
  const range = hasInterval ? ` (${percent(row[COLUMN.low], 0)} to ${percent(row[COLUMN.high], 0)})` : "";
  const speed = given(row[COLUMN.decode_tokens_per_s]) ? `${digits(row[COLUMN.decode_tokens_per_s])} tokens per second` : null;
  const lines = [p.name, `${quality.label}: ${shown}${range}`, `${bytes(row[COLUMN.nbytes])}, ${digits(row[COLUMN.smaller], 2)} times smaller`, speed];
  node.setAttribute("aria-label", lines.filter(Boolean).join("; "));
  return remark(node, ...lines);
}

// One stop for the tab key; arrows go from point to point, left to right.
function roving(dots, points) {
  const order = points.map((_, i) => i).sort((a, b) => points[a].px - points[b].px || points[a].py - points[b].py);
  order.forEach((i, at) => {
    dots[i].setAttribute("tabindex", at === 0 ? "0" : "-1");
    dots[i].addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const to = event.key === "Home" ? 0 : event.key === "End" ? order.length - 1 : step ? at + step : null;
      if (to === null) return;
      event.preventDefault();
      const next = dots[order[(to + order.length) % order.length]];
      for (const node of dots) node.setAttribute("tabindex", node === next ? "0" : "-1");
      next.focus();
    });
  });
}

// Every name at the nearest free place around its point, with a thin line if that is farther off; the front's first.
function placeLabels(points, best, [left, top, right, bottom]) {
  const taken = points.map((p) => [p.px - 6, p.py - 6, p.px + 6, p.py + 6]);
  best.forEach((i, n) => {
    if (!n) return;
    const [a, b] = [points[best[n - 1]], points[i]];
    taken.push([Math.min(a.px, b.px), a.py - 2, Math.max(a.px, b.px), a.py + 2]);
    taken.push([b.px - 2, Math.min(a.py, b.py), b.px + 2, Math.max(a.py, b.py)]);
  });
  const angles = [0, 30, -30, 180, 150, -150, 60, -60, 90, -90, 120, -120].map((d) => (d * Math.PI) / 180);
  const farthest = right - left < 420 ? 30 : 110;
  const out = [];
  const rest = points.map((_, i) => i).filter((i) => !best.includes(i));
  for (const i of [...best, ...rest]) {
    const p = points[i];
    const [w, h] = [textWidth(p.name, 11.5) + 4, 14];
    const spot = place(p, w, h);
    if (!spot) continue;
    const [x, y, far] = spot;
    taken.push([x, y, x + w, y + h]);
    if (far) out.push(svg("line", { class: "leader", x1: p.px, y1: p.py, x2: Math.max(x, Math.min(p.px, x + w)), y2: Math.max(y + 2, Math.min(p.py, y + h - 2)) }));
    out.push(svg("text", { x: x + 2, y: y + 11, "aria-hidden": "true" }, p.name));
  }
  return out;

  function place(p, w, h) {
    for (let radius = 10; radius < farthest; radius += 8) {
      for (const angle of angles) {
        const [dx, dy] = [radius * Math.cos(angle), radius * Math.sin(angle)];
        const x = p.px + dx - (dx < -1 ? w : dx > 1 ? 0 : w / 2);
        const y = p.py + dy - h / 2;
        if (x < left || x + w > right || y < top || y + h > bottom) continue;
        if (taken.every((b) => x >= b[2] || x + w <= b[0] || y >= b[3] || y + h <= b[1])) return [x, y, radius > 12];
      }
    }
    return null; // The table has it all.
  }
}
