// Heat maps: small ones side by side, all in one picture, with one scale.

// panels: [{title, values: [row][column], most?}], of the same rows and columns.
// look: rows and columns (labels), rowTitle, columnTitle, domain [low, high], format, tell(panel, r, c) -> lines,
// cell [width, height], number (of the table's), panelTitle, say (what the picture shows, for those who cannot see it).
function smallMultiples(width, panels, look) {
  if (!panels.length) return null;
  const [cellW, cellH] = look.cell;
  const left = Math.max(...look.rows.map((label) => textWidth(label))) + 14 + (look.rowTitle ? 16 : 0);
  const [panelW, panelH] = [look.columns.length * cellW, look.rows.length * cellH];
  const titles = panels.map((panel) => wrap(panel.title, Math.max(panelW, 96), 12, 600));
  const space = Math.max(panelW, ...titles.flat().map((line) => textWidth(line, 12, 600))) + 22;
  const across = Math.max(1, Math.min(panels.length, Math.floor((width - left + 22) / space)));
  const titleH = 15 * Math.max(...titles.map((lines) => lines.length)) + 7;
  const top = 34;
  const rowH = titleH + panelH + 22 + 18;
  const [scale, end] = legend(left, 4, look);
  const total = Math.max(left + across * space, end);
  const height = top + Math.ceil(panels.length / across) * rowH + (look.columnTitle ? 10 : 0);
  const out = [scale];
  panels.forEach((panel, i) => {
    const [x0, y0] = [left + (i % across) * space, top + Math.floor(i / across) * rowH];
    titles[i].forEach((line, n) => out.push(svg("text", { class: "strong", x: x0, y: y0 + 12 + 15 * n + (titleH - 7 - 15 * titles[i].length) }, line)));
    out.push(grid(panel, x0, y0 + titleH, i));
    if (i % across === 0) out.push(...sideLabels(x0, y0 + titleH));
    out.push(...footLabels(x0, y0 + titleH + panelH));
  });
  const wide = Math.min(total, Math.max(width, left + space));
  const picture = svg("svg", { width: wide, height, viewBox: `0 0 ${wide} ${height}`, role: "img", "aria-label": look.say }, out);
  return withNumbers(picture, {
    head: [look.panelTitle ?? "policy", look.rowTitle, ...look.columns.map((label) => `${look.columnTitle} ${label}`)],
    names: 2,
    rows: () => panels.flatMap((panel) => panel.values.map((row, r) => [panel.title, look.rows[r], ...row.map((v) => (given(v) ? look.number(v) : MISSING))])),
  });

  function grid(panel, x0, y0) {
    const cells = [];
    const gap = cellW > 7 && cellH > 7 ? 1 : 0;
    panel.values.forEach((row, r) =>
      row.forEach((v, c) => {
        const share = given(v) ? (v - look.domain[0]) / ((panel.most ?? look.domain[1]) - look.domain[0] || 1) : 0;
        const [x, y] = [x0 + c * cellW, y0 + r * cellH];
        const color = given(v) ? ramp(share) : "none";
        const box = svg("rect", { x, y, width: cellW - gap, height: cellH - gap, fill: color, "shape-rendering": gap ? null : "crispEdges" });
        cells.push(look.tell ? remark(box, panel.title, ...look.tell(panel, r, c)) : box);
        if (given(v) && look.write && cellW >= 24 && cellH >= 15) {
          const text = svg("text", { x: x + (cellW - gap) / 2, y: y + cellH / 2 + 3.5, "text-anchor": "middle", style: `fill: ${inkOn(color)}; font-size: 10.5px; pointer-events: none` }, look.write(v));
          cells.push(text);
        }
      }),
    );
    return svg("g", {}, cells, svg("rect", { x: x0 - 0.5, y: y0 - 0.5, width: panelW + (gap ? 0 : 1), height: panelH + (gap ? 0 : 1), class: "axis", opacity: 0.5 }));
  }
  function sideLabels(x0, y0) {
    const every = Math.ceil(13 / cellH);
    const labels = look.rows.map((label, r) => (r % every ? null : svg("text", { class: "dim", x: x0 - 7, y: y0 + (r + 0.5) * cellH + 4, "text-anchor": "end" }, label)));
    const turned = svg("text", { class: "dim", transform: `translate(11 ${y0 + panelH / 2}) rotate(-90)`, "text-anchor": "middle" }, look.rowTitle ?? "");
    return [...labels, turned].filter(Boolean);
  }
  function footLabels(x0, y0) {
    const widest = Math.max(...look.columns.map((label) => textWidth(label))) + 6;
    const every = Math.ceil(widest / cellW);
    const labels = look.columns.map((label, c) => (c % every ? null : svg("text", { class: "dim", x: x0 + (c + 0.5) * cellW, y: y0 + 14, "text-anchor": "middle" }, label)));
    if (look.columnTitle) labels.push(svg("text", { class: "dim", x: x0 + panelW / 2, y: y0 + 28, "text-anchor": "middle" }, look.columnTitle));
    return labels.filter(Boolean);
  }
}

// The scale of colours, and where it ends.
function legend(x, y, { domain, format, unit, least, most }) {
  const [wide, steps] = [110, 22];
  const low = `${least ?? format(domain[0])}`;
  const high = `${most ?? format(domain[1])}${unit ? ` ${unit}` : ""}`;
  const start = x + textWidth(low) + 7;
  const bars = Array.from({ length: steps }, (_, i) => svg("rect", { x: start + (i * wide) / steps, y, width: wide / steps + 0.5, height: 11, fill: ramp(i / (steps - 1)) }));
  const picture = svg("g", {}, svg("text", { class: "dim", x, y: y + 10 }, low), bars, svg("text", { class: "dim", x: start + wide + 7, y: y + 10 }, high));
  return [picture, start + wide + 7 + textWidth(high) + 4];
}

// Lines of at most so many pixels, broken where a policy's parts join or, where they must be, within.
function wrap(text, width, size, weight) {
  const lines = [];
  for (const part of text.split(/(?<=[ |,])|(?=\()/)) {
    const joined = lines.length ? lines[lines.length - 1] + part : part;
    if (lines.length && textWidth(joined.trimEnd(), size, weight) <= width) lines[lines.length - 1] = joined;
    else lines.push(part);
  }
  return lines.map((line) => line.trim());
}

// A table whose cells are coloured, and the same as a picture for its file.
function heatPicture(width, rows, columns, cellOf, say) {
  const left = Math.max(...rows.map((label) => textWidth(label))) + 14;
  const heads = columns.map((label) => wrap(label, 84, 11.5, 400));
  const [cellW, cellH, top] = [90, 22, 15 * Math.max(...heads.map((lines) => lines.length)) + 12];
  const [w, h] = [left + columns.length * cellW + 8, top + rows.length * cellH + 8];
  const out = [];
  heads.forEach((lines, c) => lines.forEach((line, n) => out.push(svg("text", { class: "dim", x: left + (c + 0.5) * cellW, y: top - 8 - 14 * (lines.length - 1 - n), "text-anchor": "middle" }, line))));
  rows.forEach((label, r) => {
    out.push(svg("text", { x: left - 8, y: top + (r + 0.5) * cellH + 4, "text-anchor": "end" }, label));
    columns.forEach((_, c) => {
      const { color, text } = cellOf(r, c);
      out.push(svg("rect", { x: left + c * cellW, y: top + r * cellH, width: cellW - 1, height: cellH - 1, fill: color ?? "none" }));
      out.push(svg("text", { x: left + (c + 0.5) * cellW, y: top + (r + 0.5) * cellH + 4, "text-anchor": "middle", style: color ? `fill: ${inkOn(color)}` : null }, text));
    });
  });
  return svg("svg", { width: w, height: h, viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": say }, out);
}
