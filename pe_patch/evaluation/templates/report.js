"use strict";

// Draw the charts in the reader's colour scheme, and redraw them when it changes.
const dark = matchMedia("(prefers-color-scheme: dark)");
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const specifications = read("specifications"), themes = read("themes");
const drawn = new Map();

async function draw(place) {
  const paper = dark.matches ? "dark" : "light";
  drawn.get(place)?.finalize();
  const options = {
    mode: "vega-lite", renderer: "svg", actions: false, config: themes[paper],
    tooltip: { theme: paper }, defaultStyle: false,
  };
  try {
    const specification = specifications[place.dataset.chart][Number(place.dataset.panel)];
    const { view, finalize } = await vegaEmbed(place, specification, options);
    drawn.set(place, { view, finalize });
    follow(view);
  } catch (error) {
    place.textContent = `This chart could not be drawn: ${error.message}`;
    console.error(error);
  }
}

// Synchronise the selected schemes between the legends of all charts.
const picks = "picked_store";
const values = (picked) => JSON.stringify(picked.map((entry) => entry.values));
function follow(view) {
  if (!(picks in view.getState({ data: (name) => name === picks, signals: () => false }).data)) return;
  view.picks = true;
  view.addDataListener(picks, (_, picked) => {
    for (const { view: other } of drawn.values())
      if (other.picks && values(other.data(picks)) !== values(picked))
        other.data(picks, picked.map(({ unit, fields, values }) => ({ unit, fields, values }))).runAsync();
  });
}

// Draw the charts in sequence, so that a new colour scheme never interrupts a chart. Folded charts wait.
let queue = Promise.resolve();
function drawAll(again) {
  queue = queue.then(async () => {
    for (const place of document.querySelectorAll("[data-chart]"))
      if (place.offsetParent !== null && (again || !drawn.has(place))) await draw(place);
    document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
  });
}
drawAll(false);
dark.addEventListener("change", () => {
  for (const [place, view] of drawn) if (place.offsetParent === null) { view.finalize(); drawn.delete(place); }
  drawAll(true);
});
for (const fold of document.querySelectorAll("details")) fold.addEventListener("toggle", () => drawAll(false));

// Sort a table by click on a heading, in reverse by the second click. Rows without a value stay last.
const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].firstChild?.textContent ?? "";
const missing = (text) => text === "" || text === "-";
function compare(left, right) {
  const difference = left - right;
  return Number.isNaN(difference) ? left.localeCompare(right, undefined, { numeric: true }) : difference;
}
for (const button of document.querySelectorAll("th button"))
  button.addEventListener("click", () => {
    const heading = button.parentNode, table = heading.closest("table");
    const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of table.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map((row) => [value(row, heading.cellIndex), row]);
    rows.sort(([a], [b]) => missing(a) - missing(b) || sign * compare(a, b));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  });
for (const field of document.querySelectorAll("input[type=search]"))
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase().split(/\s+/);
    for (const row of field.closest("section, details").querySelector("tbody").rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !wanted.every((word) => text.includes(word));
    }
  });
