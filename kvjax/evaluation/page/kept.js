// Who stays: slots in every layer and head, and the tokens of a prompt, over its text.

const LEVELS = 20;
const BINS = 160;
let job = null; // Unpacked, the one that is shown.
let opened = null; // The same, packed.
const keptHere = () => DATA.kept.filter(ofModel);

function startKept() {
  if (DATA.kept_left_out.length) byId("kept-missing").textContent = `Left out, so that this page stays small: ${DATA.kept_left_out.join(", ")}.`;
  else byId("kept-missing").remove();
  figure(byId("kept-budgets"), "budgets", "Slots in use by layer and KV head", (width) => job && drawBudgets(width));
  figure(byId("kept-strip"), "tokens", "Tokens kept along the prompt", (width) => job && drawStrip(width));
}

const [textFold, showTextNumbers] = numberFold(() => byId("kept-text-title").textContent);
byId("kept-text").after(textFold);

function drawKeptChoices() {
  chooseAnew(byId("kept-choices"), "Job", "job", keptHere().map((kept) => [kept.job, kept.job]), 1);
  openJob();
}

async function openJob() {
  const chosen = keptHere().find((kept) => kept.job === state.job) ?? keptHere()[0];
  if (chosen === opened) return;
  opened = chosen;
  const unpacked = chosen ? await unpack(chosen.packed) : null;
  if (chosen !== opened) return; // Another was chosen meanwhile.
  job = unpacked;
  refresh();
}

const withShare = () => job.policies.map((_, i) => i).filter((i) => job.share[i]);

function drawBudgets(width) {
  const at = job.policies.map((_, i) => i).filter((i) => shows(job.policies[i]) && job.heads[i].length);
  if (!at.length) return null;
  const heads = job.heads[at[0]][0].length;
  const most = Math.max(...at.flatMap((i) => job.heads[i].flat()));
  const panels = at.map((i) => ({ title: POLICIES[job.policies[i]].name, values: job.heads[i] }));
  return smallMultiples(width, panels, {
    rows: job.layers.map(String),
    columns: Array.from({ length: heads }, (_, i) => String(i)),
    rowTitle: "layer",
    columnTitle: "KV head",
    number: count,
    domain: [0, most],
    format: (v) => count(v),
    unit: "slots",
    write: (v) => String(v),
    cell: [Math.max(7, Math.min(36, 128 / heads)), Math.max(5, Math.min(20, 200 / job.layers.length))],
    tell: (panel, r, c) => [`layer ${job.layers[r]}, KV head ${c}`, `${count(panel.values[r][c])} slots`],
    say: `Slots in use in every full-attention layer and KV head, for ${panels.map((panel) => panel.title).join(", ")}`,
  });
}

// Means of pieces of the prompt, a row per policy.
function drawStrip(width) {
  const at = withShare().filter((i) => shows(job.policies[i]));
  if (!at.length) return null;
  const bins = Math.min(BINS, job.tokens.length);
  const edge = (b) => Math.floor((b * job.tokens.length) / bins);
  const names = at.map((i) => POLICIES[job.policies[i]].name);
  const left = width > 560 ? Math.max(...names.map((name) => textWidth(name))) + 12 : 0;
  const [rowH, top] = [left ? 18 : 32, 26];
  const height = top + at.length * rowH + 22;
  const cellW = (width - left - 8) / bins;
  const meanOf = (i, b) => {
    let sum = 0;
    for (let t = edge(b); t < edge(b + 1); t++) sum += parseInt(job.share[i][t], 36) / LEVELS;
    return sum / (edge(b + 1) - edge(b));
  };
  const [scale] = legend(left, 4, { domain: [0, 1], format: (v) => `${100 * v}`, unit: "% of heads keep it" });
  const out = [scale];
  at.forEach((i, r) => {
    const y = top + r * rowH + (left ? 0 : 15);
    out.push(svg("text", left ? { x: left - 8, y: y + 12, "text-anchor": "end" } : { x: 0, y: y - 3 }, names[r]));
    const strip = svg("g");
    for (let b = 0; b < bins; b++) {
      const mean = meanOf(i, b);
      const box = svg("rect", { x: left + b * cellW, y, width: cellW + 0.4, height: left ? rowH - 3 : 13, fill: ramp(mean) });
      strip.append(remark(box, names[r], `tokens ${count(edge(b))} to ${count(edge(b + 1) - 1)}`, `${percent(mean, 0)} % kept`));
    }
    out.push(strip);
  });
  for (const v of ticks(0, job.tokens.length, Math.max(3, width / 140))) {
    const x = left + (v / job.tokens.length) * bins * cellW;
    out.push(svg("text", { class: "dim", x, y: height - 6, "text-anchor": v === 0 ? "start" : x > width - 30 ? "end" : "middle" }, count(v)));
  }
  const say = `Share of heads that keep tokens along the prompt, for ${names.join(", ")}`;
  return withNumbers(svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": say }, out), {
    head: ["tokens", ...names],
    names: 1,
    rows: () => Array.from({ length: bins }, (_, b) => [`${count(edge(b))} to ${count(edge(b + 1) - 1)}`, ...at.map((i) => `${percent(meanOf(i, b), 0)} %`)]),
  });
}

// The text itself. Spans are made once per job; another policy only changes their colour.

let spans = [];
let spansOf = null;

function drawText() {
  const at = job ? withShare() : [];
  const title = byId("kept-text-title");
  const parts = [title, byId("kept-policy"), byId("kept-legend"), byId("kept-text")];
  for (const part of parts) part.hidden = !at.length;
  if (!at.length) return showTextNumbers(null);
  const options = at.map((i) => [POLICIES[job.policies[i]].name, POLICIES[job.policies[i]].name]);
  // The first that does not keep everything has most to show.
  if (!options.some(([name]) => name === state.shown)) state.shown = options[Math.max(0, at.findIndex((i) => /[^k]/.test(job.share[i])))][0];
  chooseAnew(byId("kept-policy"), "Policy", "shown", options, 1);
  if (spansOf !== job) makeSpans();
  const i = at.find((j) => POLICIES[job.policies[j]].name === state.shown);
  const levels = Array.from(job.share[i], (char) => parseInt(char, 36));
  spans.forEach((span, t) => {
    const level = levels[t];
    if (span.level === level) return;
    span.level = level;
    span.style.background = level ? `rgb(var(--mark), ${(level / LEVELS).toFixed(2)})` : "";
  });
  const kept = levels.reduce((sum, level) => sum + level, 0) / LEVELS / levels.length;
  byId("kept-legend").replaceChildren("0 ", el("span", { class: "scale" }), ` 100 % of heads keep a token. ${state.shown}: ${percent(kept)} % of ${count(levels.length)} tokens, mean over heads.`);
  const { tokens } = job;
  showTextNumbers({
    head: ["token", "text", `heads that keep it, ${state.shown}`],
    names: 2,
    rows: () => levels.map((level, t) => [count(t), JSON.stringify(tokens[t]), `${Math.round((100 * level) / LEVELS)} %`]),
  });
}

function makeSpans() {
  spansOf = job;
  spans = job.tokens.map((token) => el("span", {}, token));
  const pieces = [];
  for (let start = 0; start < spans.length; start += 400) pieces.push(el("div", {}, ...spans.slice(start, start + 400)));
  byId("kept-text").replaceChildren(...pieces);
  byId("kept-text").scrollTop = 0;
}

byId("kept-text").addEventListener("pointerover", (event) => {
  const t = event.target.level === undefined ? -1 : spans.indexOf(event.target);
  if (t >= 0) remark(event.target, JSON.stringify(job.tokens[t]), `token ${count(t)}`, `${Math.round((100 * event.target.level) / LEVELS)} % of heads keep it`);
});
