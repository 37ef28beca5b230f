// Drift: a line per policy along the text, its name at its end.

const driftsHere = () => DATA.drift.filter(ofModel);

function startDrift() {
  const chosen = () => driftsHere().find((drift) => drift.job === state.drift) ?? driftsHere()[0];
  const kinds = [["kl", "KL to the full cache, nats per token"], ["top1", "top-1 agreement with the full cache, %"]];
  for (const [key, label] of kinds) {
    if (!DATA.drift.some((drift) => drift[key])) continue;
    figure(byId("drift-figure"), `drift-${key}`, label, (width) => chosen()?.[key] && drawDrift(width, chosen(), key));
  }
}

function drawDriftChoices() {
  chooseAnew(byId("drift-choices"), "Job", "drift", driftsHere().map(({ job }) => [job, job]));
}

function drawDrift(width, drift, key) {
  const scale = key === "top1" ? 100 : 1;
  const lines = drift.policies
    .map((policy, i) => ({ policy, name: POLICIES[policy].name, values: drift[key][i].map((v) => v * scale) }))
    .filter(({ policy }) => policy !== 0 && shows(policy));
  if (!lines.length) return null;
  const methods = [...new Set(DATA.policies.map((policy) => policy.method))];
  const named = width > 560 ? Math.min(260, Math.max(...lines.map((line) => textWidth(line.name))) + 26) : 0;
  const height = Math.max(300, named ? lines.length * 15 + 60 : 300) + (named ? 0 : 4);
  const [left, right, top, bottom] = [46, width - named - 8, 12, height - 40];
  const pieces = lines[0].values.length;
  const tokens = drift.tokens ?? pieces;
  const at = (i) => left + ((i + 0.5) / pieces) * (right - left);
  const all = lines.flatMap((line) => line.values);
  const high = key === "top1" ? 100 : Math.max(...all) * 1.05 || 1;
  const low = key === "top1" ? Math.max(0, Math.min(...all) - 4) : 0;
  const y = (v) => bottom - ((v - low) / (high - low)) * (bottom - top);
  const out = [];
  for (const v of ticks(low, high, 5)) {
    out.push(svg("line", { class: "grid", x1: left, x2: right, y1: y(v), y2: y(v) }));
    out.push(svg("text", { class: "dim", x: left - 7, y: y(v) + 4, "text-anchor": "end" }, String(Number(v.toPrecision(3)))));
  }
  for (const v of ticks(0, tokens, Math.max(3, (right - left) / 90))) {
    const x = left + (v / tokens) * (right - left);
    out.push(svg("text", { class: "dim", x, y: bottom + 16, "text-anchor": "middle" }, count(v)));
  }
  out.push(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  out.push(svg("text", { class: "dim", x: right, y: height - 6, "text-anchor": "end" }, "tokens written"));
  const ends = spread(lines.map((line) => y(line.values[pieces - 1])), 15, top, bottom);
  lines.forEach((line, i) => {
    const { method } = POLICIES[line.policy];
    const sizes = [...new Set(POLICIES.filter((other) => other.method === method).map((other) => other.budget))];
    const dash = ["", "7 3", "2 3", "9 3 2 3"][sizes.indexOf(POLICIES[line.policy].budget) % 4];
    const color = hue(methods.indexOf(method) - 1 + 8);
    const path = line.values.map((v, n) => `${n ? "L" : "M"}${at(n).toFixed(1)},${y(v).toFixed(1)}`).join("");
    const group = svg("g", { class: "line" }, svg("path", { class: "curve", d: path, style: `stroke: ${color}; stroke-dasharray: ${dash || "none"}` }));
    group.append(svg("path", { d: path, stroke: "transparent", "stroke-width": 12, fill: "none" }));
    if (named) {
      group.append(svg("line", { class: "leader", x1: at(pieces - 1), y1: y(line.values[pieces - 1]), x2: right + 12, y2: ends[i] }));
      group.append(svg("text", { x: right + 16, y: ends[i] + 4, style: `fill: ${color}` }, line.name));
    }
    const mean = line.values.reduce((sum, v) => sum + v, 0) / pieces;
    remark(group, line.name, `mean ${digits(mean)}`, `last ${digits(line.values[pieces - 1])}`);
    group.addEventListener("pointerenter", () => highlight(group, true));
    group.addEventListener("pointerleave", () => highlight(group, false));
    out.push(group);
  });
  const say = `Along the text, means: ${lines.map((line) => `${line.name} ${digits(line.values.reduce((sum, v) => sum + v, 0) / pieces)}`).join(", ")}`;
  return withNumbers(svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": say }, out), {
    head: ["tokens written", ...lines.map((line) => line.name)],
    names: 1,
    rows: () => lines[0].values.map((_, n) => [count(Math.round(((n + 0.5) / pieces) * tokens)), ...lines.map((line) => digits(line.values[n]))]),
  });
}

function highlight(group, on) {
  for (const other of group.parentNode.querySelectorAll(".line")) {
    other.querySelector(".curve").classList.toggle("away", on && other !== group);
  }
}

// Places at least so far apart, each as near to where it should be as its neighbours let it.
function spread(places, gap, top, bottom) {
  const order = places.map((_, i) => i).sort((a, b) => places[a] - places[b]);
  const out = [...places];
  order.forEach((i, n) => (out[i] = Math.max(out[i], n ? out[order[n - 1]] + gap : top + 4)));
  order.reverse().forEach((i, n) => (out[i] = Math.min(out[i], n ? out[order[n - 1]] - gap : bottom)));
  return out;
}
