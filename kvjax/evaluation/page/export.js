// Figures: a frame with a caption and two buttons, the picture as a file of its own, and its numbers as a table.

const figures = [];
const NUMBERS = new WeakMap();

// What a picture shows, for those who read it: head (labels of columns), names (so many columns name the row), and
// rows() -> texts, asked for only when they are looked at.
function withNumbers(picture, numbers) {
  NUMBERS.set(picture, numbers);
  return picture;
}

function numberTable({ head, names, rows }, caption) {
  const cell = (text, i) => (i < names ? el("th", { scope: "row" }, text) : el("td", {}, text));
  return el(
    "table",
    {},
    el("caption", { class: "sr" }, caption),
    el("thead", {}, el("tr", {}, head.map((label) => el("th", { scope: "col" }, label)))),
    el("tbody", {}, rows().map((row) => el("tr", {}, row.map(cell)))),
  );
}

function numberFold(captionOf) {
  const place = el("div", { class: "scroll", role: "region", tabindex: "0" });
  const fold = el("details", { class: "fold", hidden: true }, el("summary", {}, "As a table"), place);
  let numbers = null;
  const fillIn = () => {
    place.setAttribute("aria-label", `As a table: ${captionOf()}`);
    place.replaceChildren(fold.open && numbers ? numberTable(numbers, captionOf()) : "");
  };
  fold.addEventListener("toggle", fillIn);
  const show = (given) => {
    numbers = given ?? null;
    fold.hidden = !numbers;
    fillIn();
  };
  return [fold, show];
}

function figure(host, name, caption, draw) {
  const canvas = el("div", { class: "canvas" });
  const title = el("figcaption");
  const button = (kind, save) => {
    const node = el("button", { type: "button", "data-export": kind.toLowerCase() }, kind);
    node.addEventListener("click", () => withPicture(canvas, draw, (picture) => save(name, picture)));
    return node;
  };
  const buttons = el("div", { class: "buttons", role: "group" }, button("SVG", saveSvg), button("PNG", savePng));
  const [fold, showNumbers] = numberFold(() => title.textContent);
  const frame = el("figure", { id: `figure-${name}` }, el("div", { class: "bar" }, title, buttons), canvas, fold);
  host.append(frame);
  figures.push(() => {
    title.textContent = typeof caption === "function" ? caption() : caption;
    buttons.setAttribute("aria-label", `Download: ${title.textContent}`);
    frame.hidden = false;
    const drawn = draw(canvas.clientWidth || 640, canvas);
    frame.hidden = !drawn;
    if (drawn) canvas.replaceChildren(drawn);
    showNumbers(drawn && NUMBERS.get(drawn));
  });
}

// A figure that is shown as a table is drawn for its file only.
function withPicture(canvas, draw, save) {
  const there = canvas.querySelector(":scope > svg");
  if (there) return save(there);
  const aside = el("div", { style: "position: absolute; left: -9999px; top: 0", "aria-hidden": "true" });
  document.body.append(aside);
  aside.append(draw.picture(900));
  save(aside.firstChild);
  aside.remove();
}

const KEPT_STYLES = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-weight", "font-family", "text-anchor", "dominant-baseline"];

function standalone(picture) {
  const copy = picture.cloneNode(true);
  const [from, to] = [picture, copy].map((root) => [root, ...root.querySelectorAll("*")]);
  from.forEach((node, i) => {
    const style = getComputedStyle(node);
    for (const name of KEPT_STYLES) {
      const value = style.getPropertyValue(name);
      if (value && value !== "none" && value !== "normal") to[i].setAttribute(name, value);
      else if (name === "fill" || name === "stroke") to[i].setAttribute(name, "none");
    }
    for (const name of ["class", "tabindex", "style"]) to[i].removeAttribute(name);
  });
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  const paper = getComputedStyle(document.documentElement).getPropertyValue("--paper").trim();
  copy.prepend(svg("rect", { width: "100%", height: "100%", fill: paper }));
  return new XMLSerializer().serializeToString(copy);
}

function download(name, blob) {
  const address = URL.createObjectURL(blob);
  const link = el("a", { href: address, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

function saveSvg(name, picture) {
  download(`${name}.svg`, new Blob([standalone(picture)], { type: "image/svg+xml" }));
}

function savePng(name, picture) {
  const [width, height] = ["width", "height"].map((side) => Number(picture.getAttribute(side)));
  const image = new Image();
  image.onload = () => {
    const canvas = el("canvas", { width: 2 * width, height: 2 * height });
    canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
    canvas.toBlob((blob) => download(`${name}.png`, blob), "image/png");
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(standalone(picture))}`;
}
