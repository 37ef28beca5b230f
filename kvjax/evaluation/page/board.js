// Filters and the leaderboard.

const SCORED = DATA.boards.some((rows) => rows.some((row) => given(row[COLUMN.score])));
const SIGNS = { better: "▲", worse: "▼" };
// What is compared: name, factor, decimals, and whether more is better.
const COMPARED = {
  score: { label: "score, points", scale: 100, places: 1, more: true },
  nll: { label: "NLL", scale: 1, places: 3, more: false },
  perplexity: { label: "log perplexity", scale: 1, places: 3, more: false },
};

// sign: 1 where more is better, which is what the first click puts on top.
const BOARD = [
  { key: "policy", label: "policy", sign: 0 },
  { key: "score", label: "score, %", sign: 1, cell: scoreCell },
  { key: "perplexity", label: "perplexity", sign: -1, cell: (row) => el("span", {}, digits(row[COLUMN.perplexity], 2), mark(row, "perplexity")) },
  { key: "nll", label: "NLL", sign: -1, cell: (row) => el("span", {}, digits(row[COLUMN.nll]), mark(row, "nll")) },
  { key: "kl", label: "KL", sign: -1, cell: (row) => digits(row[COLUMN.kl]) },
  { key: "top1", label: "top-1, %", sign: 1, cell: (row) => percent(row[COLUMN.top1]) },
  { key: "nbytes", label: "cache", sign: -1, cell: (row) => bytes(row[COLUMN.nbytes]) },
  { key: "smaller", label: "smaller, ×", sign: 1, cell: (row) => digits(row[COLUMN.smaller], 2) },
  { key: "decode_tokens_per_s", label: "tok/s", sign: 1, cell: speedCell },
];

const value = (row, key) => (key === "policy" ? POLICIES[row[0]].name : row[COLUMN[key]]);

// Whether a policy is better or worse than the one that is compared with.
function mark(row, measure) {
  const found = difference(row[0], measure);
  if (!found?.differs) return el("span", { class: "verdict" });
  const sign = found.mean > 0 === COMPARED[measure].more ? "better" : "worse";
  return el("span", { class: `verdict ${sign}` }, SIGNS[sign], el("span", { class: "sr" }, ` ${sign} than ${POLICIES[against()].name}`));
}

function scoreCell(row, rows) {
  if (!given(row[COLUMN.score])) return MISSING;
  const [low, high] = [row[COLUMN.low], row[COLUMN.high]];
  const number = el("span", {}, percent(row[COLUMN.score]), mark(row, "score"));
  if (!given(low)) return number;
  const range = el("small", { class: "range" }, el("span", { class: "sr" }, "95 % interval "), `${percent(low, 0)} to ${percent(high, 0)}`);
  return [number, range, interval(row, rows)];
}

// The interval to scale, with the score that is compared with as a line.
function interval(row, rows) {
  const other = rows.find((of) => of[0] === against()) ?? rows[0];
  const [width, full] = [64, other[COLUMN.score]];
  const ends = rows.flatMap((of) => [of[COLUMN.low], of[COLUMN.high]]).filter(given);
  const [from, to] = [Math.min(...ends), Math.max(...ends)];
  const x = (score) => 4 + ((score - from) / (to - from || 1)) * (width - 8);
  const color = row === other ? "var(--front)" : "var(--point)";
  return svg(
    "svg",
    { width, height: 14, "aria-hidden": "true" },
    given(full) ? svg("line", { x1: x(full), x2: x(full), y1: 0, y2: 14, stroke: "var(--front)", "stroke-width": 1, opacity: 0.45 }) : null,
    svg("line", { x1: x(row[COLUMN.low]), x2: x(row[COLUMN.high]), y1: 7, y2: 7, stroke: color, "stroke-width": 2, opacity: 0.5 }),
    svg("circle", { cx: x(row[COLUMN.score]), cy: 7, r: 3.2, fill: color }),
  );
}

function speedCell(row) {
  const [speed, ratio] = [row[COLUMN.decode_tokens_per_s], row[COLUMN.decode_ratio]];
  if (!given(speed)) return MISSING;
  return [digits(speed), given(ratio) ? el("small", {}, ` ${ratio.toFixed(2)}×`) : null];
}

function drawFilters() {
  const search = el("input", { type: "search", name: "q", placeholder: "such as snapkv", value: state.q, spellcheck: "false" });
  search.addEventListener("input", () => {
    state.q = search.value;
    refresh();
  });
  const all = (names, what) => [[ANY, what], ...names.map((name) => [String(name), typeof name === "number" ? count(name) : name])];
  const budgets = [...new Set(POLICIES.map((policy) => policy.budget).filter(given))];
  const fields = [el("label", { class: "field search" }, "Policy", search)];
  const add = (label, key, names, what) => names.length > 1 && fields.push(choose(label, key, all(names, what), refresh));
  if (DATA.models.length > 1) fields.push(choose("Model", "model", DATA.models.map((name) => [name, name]), refresh));
  add("Task", "task", TASKS, "all tasks");
  add("Length", "length", DATA.lengths, "all lengths");
  add("Protocol", "protocol", DATA.protocols, "all protocols");
  add("Budget", "budget", [...budgets, ...(budgets.length ? [NO_BUDGET] : [])], "all budgets");
  if (POLICIES.length > 2) fields.push(choose("Compared with", "against", POLICIES.map(({ name }) => [name, name]), refresh));
  const reset = el("button", { type: "button", id: "reset" }, "Reset");
  reset.addEventListener("click", () => {
    Object.assign(state, START);
    drawFilters();
    refresh();
    byId("filters").querySelector("input").focus();
  });
  byId("filters").onsubmit = (event) => event.preventDefault();
  byId("filters").replaceChildren(...fields, reset, el("output", { class: "count", id: "count", "aria-live": "polite" }));
}

function sorted(rows) {
  const [key, sign] = state.sort.startsWith("-") ? [state.sort.slice(1), -1] : [state.sort, 1];
  const compare = (a, b) => {
    const [x, y] = [value(a, key), value(b, key)];
    if (!given(x) || !given(y)) return given(y) - given(x);
    return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
  };
  return [...rows].sort(compare);
}

function drawBoard() {
  const rows = board();
  const columns = BOARD.filter(({ key }) => key === "policy" || rows.some((row) => given(value(row, key))));
  if (!columns.some(({ key }) => key === state.sort.replace("-", ""))) {
    state.sort = columns.some(({ key }) => key === "score") ? "-score" : columns.some(({ key }) => key === "perplexity") ? "perplexity" : "nll";
  }
  const shown = sorted(rows.filter((row) => shows(row[0])));
  const most = rows.length ? rows[0][COLUMN.jobs] : 0;
  const table = byId("board-table");
  const focused = document.activeElement?.dataset?.sort;
  table.replaceChildren(
    el("caption", { class: "sr" }, "Policies with quality, bytes and speed. Column headings sort."),
    el("thead", {}, el("tr", {}, columns.map(heading))),
    el("tbody", {}, shown.length ? shown.map((row) => boardRow(row, rows, columns, most)) : emptyRow(rows, columns)),
  );
  if (focused) table.querySelector(`[data-sort="${focused}"]`)?.focus();
  byId("count").textContent = `${shown.length} of ${rows.length} policies`;
  drawDifferences(shown);
  const what = [state.task === ANY ? (TASKS.length > 1 ? "All tasks" : TASKS[0]) : state.task];
  if (DATA.lengths.length) what.push(state.length === ANY ? (DATA.lengths.length > 1 ? "all lengths" : `${count(DATA.lengths[0])} tokens`) : `${count(Number(state.length))} tokens`);
  what.push(state.protocol === ANY ? (DATA.protocols.length > 1 ? "all protocols" : DATA.protocols[0]) : state.protocol);
  const of = most > 1 ? ` Means over ${most} jobs (a task at one length under one protocol), which count alike.` : "";
  if (DATA.models.length > 1) what.unshift(state.model);
  byId("board-about").textContent = `${what.join(", ")}. ${rows.length ? count(rows[0][COLUMN.samples]) : 0} samples.${of}`;
}

function heading({ key, label, sign }) {
  const [current, down] = [state.sort.replace("-", "") === key, state.sort.startsWith("-")];
  const button = el("button", { type: "button", "data-sort": key }, label);
  button.addEventListener("click", () => {
    const first = sign > 0 ? `-${key}` : key;
    state.sort = current ? (down ? key : `-${key}`) : first;
    refresh();
  });
  return el("th", { scope: "col", "aria-sort": current ? (down ? "descending" : "ascending") : null }, button);
}

function boardRow(row, rows, columns, most) {
  const policy = POLICIES[row[0]];
  const part = row[COLUMN.jobs] < most ? el("small", {}, `${row[COLUMN.jobs]} of ${most} jobs`) : null;
  const cells = columns.slice(1).map(({ cell }) => el("td", {}, cell(row, rows)));
  return el("tr", { class: row[0] === 0 ? "full" : null, "data-policy": policy.name }, el("th", { scope: "row", title: policy.name }, el("code", {}, policy.name), part), cells);
}

function emptyRow(rows, columns) {
  const why = rows.length ? "No policy has this name and budget." : "There is no job of this task, length and protocol.";
  return el("tr", {}, el("td", { class: "empty", colspan: columns.length }, why));
}

// Every difference from the policy that is compared with, as numbers.
function drawDifferences(rows) {
  const name = POLICIES[against()].name;
  const found = rows.map((row) => [row[0], Object.fromEntries(Object.keys(COMPARED).map((key) => [key, difference(row[0], key)]))]);
  const keys = Object.keys(COMPARED).filter((key) => found.some(([, of]) => of[key]));
  const fold = byId("differences");
  fold.hidden = !keys.length;
  fold.querySelector("summary").textContent = `Differences from ${name}: intervals and p-values`;
  const head = el("tr", {}, el("th", { scope: "col" }, "policy"), keys.flatMap((key) => [COMPARED[key].label, "95 %", "p"].map((label) => el("th", { scope: "col" }, label))));
  const body = found.filter(([, of]) => keys.some((key) => of[key])).map(([policy, of]) =>
    el("tr", { "data-policy": POLICIES[policy].name }, el("th", { scope: "row" }, el("code", {}, POLICIES[policy].name)), keys.flatMap((key) => differenceCells(policy, key, of[key]))),
  );
  byId("difference-table").replaceChildren(el("caption", { class: "sr" }, `Differences from ${name}`), el("thead", {}, head), el("tbody", {}, body));
}

function differenceCells(policy, key, found) {
  if (!found) return [MISSING, "", ""].map((text) => el("td", {}, text));
  const { scale, places } = COMPARED[key];
  const show = (v) => (scale * v).toFixed(places).replace(/^-(?=0\.0*$)/, "").replace("-", "−");
  const range = given(found.low) ? `${show(found.low)} to ${show(found.high)}` : "unknown";
  return [
    el("td", {}, `${found.mean > 0 ? "+" : ""}${show(found.mean)}`, mark([policy], key)),
    el("td", {}, el("small", {}, range)),
    el("td", {}, found.p < 0.0005 ? "<0.001" : found.p.toFixed(3)),
  ];
}

function drawNotes() {
  const parts = ["NLL: nats per token of the right answer. KL and top-1: predictions against the full cache's, along the text that it writes. tok/s: decoding, and its ratio to the full cache's."];
  if (SCORED) parts.unshift("Intervals of scores: 95 %, over contexts (score interval within jobs).");
  if (POLICIES.length > 1) parts.push("▲ and ▼: better and worse than the policy that is compared with, on the same samples (sign-flip test over contexts, Holm over all policies, 95 %).");
  if (SCORED && DATA.tasks.some((task) => task.metric === "perplexity")) parts.push("Tasks of perplexity have no score and stand apart.");
  const out = Object.keys(DATA.about.left_out).length;
  if (out) parts.push(`In ${out} ${out === 1 ? "job" : "jobs"} some policies could not serve and were left out; their means are over the jobs that they served.`);
  byId("board-notes").textContent = parts.join(" ");
}
