"use strict";
// The legend hides groups in every chart; the pointer reads the curves. The page is whole without this script.
const charts = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();

function show(group, on) {
  if (on) hidden.delete(group); else hidden.add(group);
  for (const part of document.querySelectorAll(`figure [data-group="${group}"]`)) part.classList.toggle("off", !on);
  const button = document.querySelector(`.legend button[data-group="${group}"]`);
  if (button) button.setAttribute("aria-pressed", String(on));
}

for (const button of document.querySelectorAll(".legend button[data-group]")) {
  const group = Number(button.dataset.group);
  button.addEventListener("click", () => show(group, hidden.has(group)));
}
const all = document.querySelector(".legend button.all");
if (all) all.addEventListener("click", () => {
  const groups = [...document.querySelectorAll(".legend button[data-group]")].map(b => Number(b.dataset.group));
  const on = hidden.size > 0;
  for (const group of groups) show(group, on);
});

function nearest(values, wanted) {
  let low = 0, high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle; else high = middle;
  }
  return wanted - values[low] <= values[high] - wanted ? low : high;
}

function watch(figure, chart) {
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor"), tip = document.createElement("div");
  tip.className = "tip off";
  figure.append(tip);
  const leave = () => { tip.classList.add("off"); cursor.setAttribute("visibility", "hidden"); };
  const move = event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const wanted = (event.clientX - box.left) * scale;
    const found = chart.lines.filter(line => !hidden.has(line.group)).map(line => [line, nearest(line.x, wanted)]);
    if (!found.length) return leave();
    const [first, index] = found.reduce((a, b) =>
      Math.abs(b[0].x[b[1]] - wanted) < Math.abs(a[0].x[a[1]] - wanted) ? b : a);
    const at = first.x[index];
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", "visible");
    tip.replaceChildren(document.createTextNode(`${chart.xlabel} ${first.at[index]}`));
    const near = found.filter(([line, i]) => Math.abs(line.x[i] - at) < 12).sort((a, b) => b[0].y[b[1]] - a[0].y[a[1]]);
    for (const [line, i] of near) {
      const row = document.createElement("div"), mark = document.createElement("i"), value = document.createElement("b");
      mark.style.background = line.colour;
      value.textContent = line.y[i];
      row.append(mark, value, ` ${line.label}`);
      tip.append(row);
    }
    tip.classList.remove("off");
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", leave);
}

for (const figure of document.querySelectorAll("figure[data-chart]")) watch(figure, charts[figure.dataset.chart]);
