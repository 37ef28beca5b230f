// The start: what was run, which parts there are, and drawing whenever something is chosen.

const nothing = () => {};
// Of each part: id, title, whether there is something in it, how it begins, and what is drawn before its figures.
const PARTS = [
  ["board", "Leaderboard", () => true, nothing, drawBoard],
  ["pareto", "What a byte buys", () => true, startPareto, drawParetoChoices],
  ["tasks", "Task by task", () => TASKS.length > 1, startTasks, nothing],
  ["needles", "Needles by depth", () => DATA.needles.length, startNeedles, drawNeedleChoices],
  ["drift", "Drift", () => DATA.drift.length, startDrift, drawDriftChoices],
  ["kept", "Who stays", () => DATA.kept.length, startKept, drawKeptChoices],
  ["heads", "What heads look at", () => DATA.heads.length, startHeads, nothing],
];

let waiting = 0;

// What is chosen goes into the address, and everything is drawn anew, once for all that happens at a time.
function refresh() {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => {
    for (const [, , there, , draw] of PARTS) if (there()) draw();
    for (const draw of figures) draw();
    if (DATA.kept.length) drawText();
    writeHash();
  });
}

function drawHead() {
  const { about } = DATA;
  const list = (values) => values.join(", ");
  const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
  const others = POLICIES.length - 1;
  byId("lede").textContent =
    `${plural(others, "way")} to keep a smaller KV cache of ${list(about.models)}, next to the full one: ` +
    `${plural(about.tasks.length, "task")}, ${plural(about.samples, "sample")}, every policy on the very same prompts.`;
  const span = (ends, format) => (ends[0] === ends[1] ? format(ends[0]) : `${format(ends[0])} to ${format(ends[1])}`);
  const facts = {
    Model: `${list(about.models)}${about.dtypes.length ? ` (${list(about.dtypes)})` : ""}`,
    Device: list(about.devices),
    Tasks: list(about.tasks),
    Protocols: list(about.protocols.map((name) => `question-${name}`)),
    Prompts: about.prompts ? `${span(about.prompts, count)} tokens` : "",
    Samples: `${count(about.samples)} in ${plural(about.jobs, "job")}`,
    Versions: Object.entries(about.versions).filter(([name]) => name !== "jaxlib").map(([name, all]) => `${name} ${list(all)}`).join(", "),
    Run: about.to ? about.to.slice(0, 10) : "",
  };
  const shown = Object.entries(facts).filter(([, text]) => text);
  byId("facts").append(...shown.map(([name, text]) => el("div", { class: text.length > 50 ? "long" : null }, el("dt", {}, name), el("dd", {}, text))));
  byId("config").textContent = JSON.stringify(DATA.config, null, 2);
}

function goTo(id) {
  const title = byId(`${id}-title`);
  title.scrollIntoView();
  title.focus({ preventScroll: true });
}

async function start() {
  PAIRS = await unpack(DATA.pairs);
  readHash();
  drawHead();
  drawFilters();
  drawNotes();
  for (const [id, title, there, begin] of PARTS) {
    if (!there()) {
      byId(id).remove();
      continue;
    }
    byId("contents").append(el("li", {}, el("a", { href: `#${id}`, "data-to": id }, title)));
    begin();
  }
  for (const link of document.querySelectorAll("a[data-to]")) {
    link.addEventListener("click", (event) => {
      event.preventDefault(); // What stands behind # is what is chosen.
      goTo(link.dataset.to);
    });
  }
  addEventListener("hashchange", () => {
    readHash();
    drawFilters();
    refresh();
  });
  dark.addEventListener("change", refresh);
  let width = innerWidth;
  addEventListener("resize", () => innerWidth !== width && ((width = innerWidth), refresh()));
  refresh();
}

start();
