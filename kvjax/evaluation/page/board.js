// Filters and the leaderboard.

const SCORED = DATA.boards.some((rows) => rows.some((row) => given(row[COLUMN.score])));
const SIGNS = { better: ["▲", "better than the full cache"], worse: ["▼", "worse than the full cache"] };

// sign: 1 where more is better, which is what the first click puts on top.
const BOARD = [
  { key: "policy", label: "policy", sign: 0 },
  { key: "score", label: "score, %", sign: 1, cell: scoreCell },
  { key: "perplexity", label: "perplexity", sign: -1, cell: (row) => digits(row[COLUMN.perplexity], 2) },
  { key: "nll", label: "NLL", sign: -1, cell: (row) => digits(row[COLUMN.nll]) },
  { key: "kl", label: "KL", sign: -1, cell: (row) => digits(row[COLUMN.kl]) },
  { key: "top1", label: "top-1, %", sign: 1, cell: (row) => percent(row[COLUMN.top1]) },
  { key: "nbytes", label: "cache", sign: -1, cell: (row) => bytes(row[COLUMN.nbytes]) },
  { key: "smaller", label: "smaller, ×", sign: 1, cell: (row) => digits(row[COLUMN.smaller], 2) },
  { key: "decode_tokens_per_s", label: "tok/s", sign: 1, cell: speedCell },
];

const value = (row, key) => (key === "policy" ? POLICIES[row[0]].name : row[COLUMN[key]]);

function verdict(row) {
  if (!row[COLUMN.differs]) return "";
  return row[COLUMN.difference] > 0 ? "better" : "worse";
}

function scoreCell(row, rows) {
  if (!given(row[COLUMN.score])) return MISSING;
  const [low, high, sign] = [row[COLUMN.low], row[COLUMN.high], verdict(row)];
  const mark = el("span", { class: `verdict ${sign}` }, sign ? SIGNS[sign][0] : "");
  if (sign) mark.append(el("span", { class: "sr" }, ` ${SIGNS[sign][1]}`));
  const number = el("span", {}, percent(row[COLUMN.score]), mark);
  if (!given(low)) return number;
  const range = el("small", { class: "range" }, el("span", { class: "sr" }, "95 % interval "), `${percent(low, 0)} to ${percent(high, 0)}`);
  return [number, range, interval(row, rows)];
}

// The interval to scale, with the full cache's score as a line.
function interval(row, rows) {
  const [width, full] = [64, rows[0][COLUMN.score]];
  const ends = rows.flatMap((other) => [other[COLUMN.low], other[COLUMN.high]]).filter(given);
  const [from, to] = [Math.min(...ends), Math.max(...ends)];
  const x = (score) => 4 + ((score - from) / (to - from || 1)) * (width - 8);
  const color = row[0] === 0 ? "var(--front)" : "var(--point)";
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
  add("Task", "task", TASKS, "all tasks");
  add("Length", "length", DATA.lengths, "all lengths");
  add("Protocol", "protocol", DATA.protocols, "all protocols");
  add("Budget", "budget", [...budgets, ...(budgets.length ? [NO_BUDGET] : [])], "all budgets");
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
  const what = [state.task === ANY ? (TASKS.length > 1 ? "All tasks" : TASKS[0]) : state.task];
  if (DATA.lengths.length) what.push(state.length === ANY ? (DATA.lengths.length > 1 ? "all lengths" : `${count(DATA.lengths[0])} tokens`) : `${count(Number(state.length))} tokens`);
  what.push(state.protocol === ANY ? (DATA.protocols.length > 1 ? "all protocols" : DATA.protocols[0]) : state.protocol);
  const of = most > 1 ? ` Means over ${most} jobs (a task at one length under one protocol), which count alike.` : "";
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

function drawNotes() {
  const parts = ["NLL: nats per token of the right answer. KL and top-1: predictions against the full cache's, along the text that it writes. tok/s: decoding, and its ratio to the full cache's."];
  if (SCORED) parts.unshift("Intervals: bootstrap over contexts, 95 %. ▲ and ▼: differs from the full cache on the same samples (sign-flip test, Holm over all policies, 95 %).");
  if (SCORED && DATA.tasks.some((task) => task.metric === "perplexity")) parts.push("Tasks of perplexity have no score and stand apart.");
  const out = Object.keys(DATA.about.left_out).length;
  if (out) parts.push(`In ${out} ${out === 1 ? "job" : "jobs"} some policies could not serve and were left out; their means are over the jobs that they served.`);
  byId("board-notes").textContent = parts.join(" ");
}
