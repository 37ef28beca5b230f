// What is drawn as heat maps: tasks, needles, attention heads.

// Tasks

function taskCells() {
  const policies = POLICIES.map((_, i) => i).filter(shows);
  const rows = TASKS.map((task) => new Map(board(task).map((row) => [row[0], row])));
  const columns = TASKS.map((_, i) => i).filter((i) => rows[i].size && (state.task === ANY || state.task === TASKS[i]));
  const shown = policies.filter((policy) => columns.some((task) => rows[task].has(policy)));
  return { policies: shown, columns, cell };

  function cell(policy, task) {
    const row = rows[task].get(policy);
    if (!row) return { color: null, text: MISSING };
    const score = row[COLUMN.score];
    if (given(score)) return { color: ramp(score), text: percent(score), share: score };
    const [mine, full] = [row, rows[task].get(0)].map((of) => of?.[COLUMN.perplexity]);
    if (!given(mine)) return { color: null, text: MISSING };
    return { color: ramp(given(full) ? full / mine : 1), text: digits(mine, 2) };
  }
}
const taskLabel = (task) => DATA.tasks[task].name.replaceAll("_", "_\u200b") + (DATA.tasks[task].metric === "perplexity" ? " (perplexity)" : "");

function drawTasks(width, canvas) {
  const { policies, columns, cell } = taskCells();
  if (!policies.length || !columns.length) return null;
  const head = el("tr", {}, el("th", { scope: "col" }, "policy"), columns.map((task) => el("th", { scope: "col" }, taskLabel(task))));
  const body = policies.map((policy) =>
    el(
      "tr",
      { class: policy === 0 ? "full" : null },
      el("th", { scope: "row", title: POLICIES[policy].name }, el("code", {}, POLICIES[policy].name)),
      columns.map((task) => {
        const { color, text } = cell(policy, task);
        return el("td", { style: color ? `background: ${color}; color: ${inkOn(color)}` : null }, text);
      }),
    ),
  );
  const caption = el("caption", { class: "sr" }, "Scores in percent, and perplexities, of every policy on every task.");
  return el("div", { class: "scroll heat", role: "region", "aria-label": "Table of policies by tasks", tabindex: "0" }, el("table", {}, caption, el("thead", {}, head), el("tbody", {}, body)));
}
drawTasks.picture = (width) => {
  const { policies, columns, cell } = taskCells();
  const names = policies.map((policy) => POLICIES[policy].name);
  return heatPicture(width, names, columns.map((task) => taskLabel(task).replaceAll("\u200b", "")), (r, c) => cell(policies[r], columns[c]), "Policies by tasks");
};

function startTasks() {
  const scored = DATA.tasks.some((task) => task.metric !== "perplexity");
  const other = DATA.tasks.some((task) => task.metric === "perplexity");
  byId("tasks-about").textContent = [
    scored ? "Scores in percent; darker is nearer to 100." : "",
    other ? "Perplexities are coloured by how near they are to the full cache's." : "",
    "Follows length and protocol above.",
  ].join(" ").replace("darker", dark.matches ? "brighter" : "darker").trim();
  figure(byId("tasks-figure"), "tasks", "Policies by tasks", drawTasks);
}

// Needles

const needleName = (needle) => `${needle.task}, ${needle.protocol}`;

const needlesHere = () => DATA.needles.filter(ofModel);

function startNeedles() {
  const chosen = () => needlesHere().find((needle) => needleName(needle) === state.needles) ?? needlesHere()[0];
  const caption = () => `Needles found: ${chosen() ? needleName(chosen()) : MISSING}`;
  figure(byId("needles-figure"), "needles", caption, (width) => chosen() && drawNeedles(width, chosen()));
}

function drawNeedleChoices() {
  chooseAnew(byId("needles-choices"), "Task and protocol", "needles", needlesHere().map((needle) => [needleName(needle), needleName(needle)]));
}

function drawNeedles(width, needle) {
  const at = needle.policies.map((_, i) => i).filter((i) => shows(needle.policies[i]));
  const panels = at.map((i) => ({ title: POLICIES[needle.policies[i]].name, values: needle.scores[i] }));
  const side = Math.max(16, Math.min(40, 130 / needle.lengths.length));
  return smallMultiples(width, panels, {
    rows: needle.depths.map((depth) => String(depth)),
    columns: needle.lengths.map((length) => (length >= 10000 ? `${Math.round(length / 1000)}k` : String(length))),
    rowTitle: "depth",
    columnTitle: "tokens",
    number: (v) => `${percent(v)} %`,
    domain: [0, 1],
    format: (v) => `${100 * v}`,
    unit: "% found",
    cell: [side, Math.max(14, Math.min(22, 150 / needle.depths.length))],
    tell: (panel, r, c) => [`depth ${needle.depths[r]}, ${count(needle.lengths[c])} tokens`, given(panel.values[r][c]) ? `${percent(panel.values[r][c])} % found` : "not asked"],
    say: `Share of needles found by depth and length, for ${panels.map((panel) => panel.title).join(", ")}`,
  });
}

// Heads

const HEAD_MAPS = [["sink", "attention sink"], ["retrieval", "retrieval"], ["local", "local"]];

function startHeads() {
  figure(byId("heads-figure"), "heads", "Attention heads by layer", (width) => {
    const heads = DATA.heads.find(ofModel);
    byId("heads-about").textContent = heads?.how ?? "";
    if (!heads) return null;
    const panels = HEAD_MAPS.filter(([key]) => heads[key]).map(([key, title]) => ({ title, values: heads[key], key }));
    const heightOfCell = Math.max(7, Math.min(24, 260 / heads.layers.length));
    const space = Math.min(300, Math.max(120, (width - 60) / 3 - 24));
    const columns = heads[panels[0].key][0].length;
    return smallMultiples(width, panels, {
      rows: heads.layers.map(String),
      columns: Array.from({ length: columns }, (_, i) => String(i)),
      rowTitle: "layer",
      columnTitle: "query head",
      panelTitle: "map",
      number: (v) => v.toFixed(3),
      domain: [0, 1],
      format: (v) => String(v),
      cell: [Math.max(6, Math.min(40, space / columns)), heightOfCell],
      write: (v) => v.toFixed(2),
      tell: (panel, r, c) => [`layer ${heads.layers[r]}, head ${c}`, panel.values[r][c].toFixed(3)],
      say: "Attention sink, retrieval score and local attention of every query head in every full-attention layer",
    });
  });
}
