"use strict";
// What a chart says under the pointer: the value of every line at that place.
for (const figure of document.querySelectorAll("[data-hover]")) {
  const chart = JSON.parse(figure.dataset.hover), svg = figure.querySelector("svg");
  const tip = document.createElement("div"), rule = document.createElementNS(svg.namespaceURI, "line");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  rule.setAttribute("stroke", "var(--muted)");
  rule.setAttribute("stroke-width", "0.8");
  svg.append(rule);
  const at = (points, x) => {
    const next = points.findIndex((p) => p[0] >= x);
    if (next < 0 || x < points[0][0]) return null;
    if (next === 0) return points[0][1];
    const [a, b] = [points[next - 1], points[next]];
    return a[1] + ((b[1] - a[1]) * (x - a[0])) / (b[0] - a[0] || 1);
  };
  const hide = () => { tip.hidden = true; rule.setAttribute("visibility", "hidden"); };
  const show = (event) => {
    const box = svg.getBoundingClientRect(), scale = chart.width / box.width;
    const place = (event.clientX - box.left) * scale;
    if (place < chart.left || place > chart.right) return hide();
    const x = chart.from + ((place - chart.left) / (chart.right - chart.left)) * (chart.to - chart.from);
    const rows = chart.lines.map((line) => [line, at(line.points, x)]).filter((row) => row[1] !== null);
    if (!rows.length) return hide();
    const title = document.createElement("b");
    title.textContent = `${x < 100 ? x.toFixed(1) : Math.round(x)} ${chart.unit}`;
    tip.replaceChildren(title, ...rows.map(([line, y]) => {
      const row = document.createElement("span");
      row.style.setProperty("--role", `var(--${line.role})`);
      row.textContent = `${line.name}  ${y.toPrecision(4)}`;
      return row;
    }));
    for (const [name, value] of Object.entries({ x1: place, x2: place, y1: chart.top, y2: chart.bottom }))
      rule.setAttribute(name, value);
    rule.setAttribute("visibility", "visible");
    tip.hidden = false;
    const frame = figure.getBoundingClientRect(), x0 = event.clientX - frame.left;
    const left = x0 + 14 + tip.offsetWidth > frame.width ? x0 - 14 - tip.offsetWidth : x0 + 14;
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${box.top - frame.top + 8}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
// All clips together, so that the same moment of a motion can be compared.
const button = document.getElementById("play");
if (button) {
  const videos = [...document.querySelectorAll("video")];
  const set = (playing) => {
    for (const video of videos) {
      if (playing) { video.currentTime = 0; video.play(); } else video.pause();
    }
    button.textContent = playing ? "Pause all" : "Play all";
    button.setAttribute("aria-pressed", String(playing));
  };
  button.addEventListener("click", () => set(button.textContent === "Play all"));
  set(!matchMedia("(prefers-reduced-motion: reduce)").matches);
}
