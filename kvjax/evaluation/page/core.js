"use strict";
// The page's ground: its data, what is chosen (and kept in the address), elements, numbers, colours, remarks.

const DATA = JSON.parse(document.getElementById("data").textContent);
const POLICIES = DATA.policies;
const COLUMN = Object.fromEntries(DATA.columns.map((name, i) => [name, i + 1]));
const ANY = "*";

// Elements. Text goes in as text: nothing that the data say is ever taken for markup.

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const byId = (id) => document.getElementById(id);

// What is chosen: in the address behind #, by name, so that a link shows what its sender saw.

const START = { q: "", model: DATA.models[0], against: POLICIES[DATA.against].name, task: ANY, length: ANY, protocol: ANY, budget: ANY, sort: "", y: "", needles: "", drift: "", job: "", shown: "" };
const state = { ...START };

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const key of Object.keys(START)) state[key] = given.get(key) ?? START[key];
}

function writeHash() {
  const said = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) if (value !== START[key]) said.set(key, value);
  const hash = said.toString();
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

const index = (names, name) => (name === ANY ? ANY : names.findIndex((other) => String(other) === name));
const TASKS = DATA.tasks.map((task) => task.name);

// The board's index, undefined where there is no job of what is chosen.
function boardAt(task = state.task, length = state.length, protocol = state.protocol) {
  const model = Math.max(0, DATA.models.indexOf(state.model));
  return DATA.keys[[model, index(TASKS, task), index(DATA.lengths, length), index(DATA.protocols, protocol)].join("/")];
}
const board = (...chosen) => DATA.boards[boardAt(...chosen)] ?? [];
const ofModel = ({ model }) => model === Math.max(0, DATA.models.indexOf(state.model));

const against = () => Math.max(0, POLICIES.findIndex((policy) => policy.name === state.against));

// How a policy differs from the one that is compared with, by one measure, or null: {mean, low, high, p, differs}.
function difference(policy, measure) {
  const pairs = PAIRS[boardAt()];
  const found = pairs?.[measure];
  const [a, b] = [policy, against()].map((of) => pairs?.policies.indexOf(of) ?? -1);
  const pair = a < 0 || b < 0 || a === b ? null : found?.pairs[Math.max(a, b)][Math.min(a, b)];
  if (!pair) return null;
  const [mean, low, high, p] = pair;
  const differs = found.differs[b][a] === "1";
  if (a > b) return { mean, low, high, p, differs };
  return { mean: -mean, low: given(high) ? -high : null, high: given(low) ? -low : null, p, differs };
}

const NO_BUDGET = "none";

function shows(policy) {
  const { name, budget } = POLICIES[policy];
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const size = state.budget === ANY || policy === 0 || (budget ?? NO_BUDGET) === state.budget;
  return size && words.every((word) => name.toLowerCase().includes(word));
}

let PAIRS = []; // Differences of any two policies, board by board; unpacked at the start.

async function unpack(packed) {
  const raw = Uint8Array.from(atob(packed), (char) => char.charCodeAt(0));
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}

// Numbers.

const MISSING = "–";
const given = (value) => value !== null && value !== undefined;

function digits(value, number = 3) {
  if (!given(value)) return MISSING;
  if (value > 0 && value < 0.0005) return "<0.001";
  const size = Math.abs(value);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? Math.min(1, number) : size >= 1 ? Math.min(2, number) : number);
}
const percent = (value, places = 1) => (given(value) ? (100 * value).toFixed(places) : MISSING);
const count = (value) => value.toLocaleString("en");

function bytes(value) {
  if (!given(value)) return MISSING;
  const [size, unit] = value >= 1e9 ? [value / 1e9, "GB"] : value >= 1e6 ? [value / 1e6, "MB"] : [value / 1e3, "kB"];
  return `${size.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2)} ${unit}`;
}

// Colours: lightness alone tells them in order, from the paper's to the far end, for every kind of sight.

const dark = matchMedia("(prefers-color-scheme: dark)");
const RAMPS = {
  light: ["#f0f3f1", "#c5e0da", "#86c2c3", "#4597ae", "#226690", "#1a3a69"],
  dark: ["#20262c", "#1d3f5b", "#1f6387", "#388ea7", "#7cc0bc", "#dcf2e8"],
};
const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

function ramp(share) {
  const stops = RAMPS[dark.matches ? "dark" : "light"].map(channels);
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  const rgb = stops[low].map((from, i) => Math.round(from + (at - low) * (stops[low + 1][i] - from)));
  return `rgb(${rgb.join(", ")})`;
}

function inkOn(color) {
  const [r, g, b] = color.match(/\d+/g).map((x) => (x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000000" : "#ffffff";
}

// Eight colours that stay apart for every kind of sight (after Okabe and Ito), with the contrast that lines need.
const HUES = {
  light: ["#0072b2", "#b8500c", "#00785a", "#a8548a", "#8a6d00", "#3a86b8", "#6b3fa0", "#4a5560"],
  dark: ["#56b4e9", "#e8894a", "#2fbf95", "#de94c2", "#e6c229", "#8fb8ff", "#b497e7", "#b5bec7"],
};
const hue = (i) => HUES[dark.matches ? "dark" : "light"][i % 8];

// Remarks on what the pointer, a finger or the focus is on.

const TIPS = new WeakMap();
const tip = byId("tip");
let tipped = null; // What the remark is on.

function remark(node, ...lines) {
  TIPS.set(node, lines);
  return node;
}

function showTip(node, x, y) {
  const [title, ...rest] = TIPS.get(node);
  tip.replaceChildren(el("b", {}, title), ...rest.filter(Boolean).map((line) => el("i", {}, line)));
  tip.hidden = false;
  tipped = node;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(6, Math.min(x + 14, innerWidth - width - 6));
  const top = y + 18 + height > innerHeight ? y - height - 12 : y + 18;
  tip.style.left = `${left}px`;
  tip.style.top = `${Math.max(6, top)}px`;
}

function remarked(node) {
  while (node && node !== document && !TIPS.has(node)) node = node.parentNode;
  return node && TIPS.has(node) ? node : null;
}
function tipOfPointer(event) {
  const node = remarked(event.target);
  if (node) showTip(node, event.clientX, event.clientY);
  else tip.hidden = true;
}
document.addEventListener("pointermove", tipOfPointer);
document.addEventListener("pointerdown", tipOfPointer); // A finger that taps does not move.
function tipOfFocus() {
  const node = remarked(document.activeElement);
  if (!node) return; // What a finger has called up stays.
  const box = node.getBoundingClientRect();
  showTip(node, box.left + box.width / 2, box.top + box.height / 2);
}
document.addEventListener("focusin", tipOfFocus);
document.addEventListener("focusout", (event) => remarked(event.target) === tipped && (tip.hidden = true));
document.addEventListener("keydown", (event) => event.key === "Escape" && (tip.hidden = true));
function tipOfScroll() {
  tip.hidden = true;
  tipOfFocus(); // It may have made the page scroll.
}
addEventListener("scroll", () => tip.hidden || tipOfScroll(), { passive: true });

// Choosing.

function choose(label, key, options, onChange) {
  const select = el("select", { name: key }, options.map(([value, text]) => el("option", { value }, text)));
  select.value = options.some(([value]) => value === state[key]) ? state[key] : options[0][0];
  select.addEventListener("change", () => {
    state[key] = select.value;
    onChange();
  });
  return el("label", { class: "field" }, label, select);
}

// A choice whose options follow other choices: drawn anew, the focus stays on it.
function chooseAnew(host, label, key, options, least = 2) {
  const focused = host.contains(document.activeElement);
  host.replaceChildren(options.length >= least ? choose(label, key, options, refresh) : "");
  if (focused) host.querySelector("select")?.focus();
}

const ruler = document.createElement("canvas").getContext("2d");
function textWidth(text, size = 11.5, weight = 400) {
  ruler.font = `${weight} ${size}px system-ui, sans-serif`;
  return ruler.measureText(text).width;
}
