"use strict";
// The page can be read without any of this: it adds the switch of the theme, sorting, filters, and words for cells.

function addThemeSwitch() {
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const button = document.createElement("button");
  let chosen = null; // until someone chooses, the page follows the system
  const show = () => {
    const dark = chosen === null ? system.matches : chosen === "dark";
    root.style.colorScheme = chosen === null ? "" : chosen;
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to the ${dark ? "light" : "dark"} theme`);
  };
  button.id = "theme";
  button.type = "button";
  button.addEventListener("click", () => {
    chosen = button.textContent.toLowerCase();
    show();
  });
  system.addEventListener("change", show);
  show();
  document.body.prepend(button);
}

// What a cell is sorted by: the number it carries, else its text; empty and unknown cells come last in both directions.
function sortKey(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.value ?? cell.textContent.trim();
  if (text === "" || text === "–") return null;
  const number = Number(text);
  return Number.isNaN(number) ? text : number;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortBy(table, column, descending) {
  for (const body of table.tBodies) {
    const rows = [...body.rows].map((row, place) => ({ row, place, key: sortKey(row, column) }));
    rows.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.place - b.place;
      return (descending ? -1 : 1) * compare(a.key, b.key) || a.place - b.place;
    });
    body.append(...rows.map((entry) => entry.row));
  }
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const numbersFirst = !head.classList.contains("text"); // of numbers, the largest are asked for first
      const descending = before === null ? numbersFirst : before === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortBy(table, column, descending);
    });
  });
}

function makeFilterable(table) {
  const controls = document.createElement("div");
  const input = document.createElement("input");
  const count = document.createElement("span");
  const rows = [...table.tBodies].flatMap((body) => [...body.rows]);
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const show = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !words.every((word) => texts.get(row).includes(word));
      shown += !row.hidden;
    }
    count.textContent = words.length ? `${shown} of ${rows.length}` : `${rows.length} rows`;
  };
  controls.className = "controls";
  count.setAttribute("role", "status");
  input.type = "search";
  input.placeholder = table.dataset.filter;
  input.setAttribute("aria-label", table.dataset.filter);
  input.addEventListener("input", show);
  controls.append(input, count);
  table.parentElement.before(controls);
  show();
}

function addBaseChoice(table) {
  const bodies = [...table.tBodies];
  const controls = document.createElement("label");
  const select = document.createElement("select");
  controls.className = "controls";
  bodies.forEach((body) => select.append(new Option(body.dataset.base)));
  select.addEventListener("change", () => bodies.forEach((body, index) => (body.hidden = index !== select.selectedIndex)));
  controls.append("Compared with", select);
  table.parentElement.before(controls);
}

// Says the cell of a confusion matrix that is pointed at.
function tellCells(figure) {
  const { names, entries, totals, box } = JSON.parse(figure.querySelector("script").textContent);
  const [left, top, right, bottom] = box;
  const counts = new Map(entries.map(([row, column, count]) => [row * names.length + column, count]));
  const svg = figure.querySelector("svg");
  const told = figure.querySelector(".told");
  const tell = (event) => {
    const place = svg.getBoundingClientRect();
    const along = (at, from, to) => Math.floor(((at - from) / (to - from)) * names.length);
    const column = along((event.clientX - place.left) / place.width, left, right);
    const row = along((event.clientY - place.top) / place.height, top, bottom);
    if (names[row] === undefined || names[column] === undefined) return;
    const count = counts.get(row * names.length + column) ?? 0;
    const verb = row === column ? "rightly answered" : `taken for ${names[column]}`;
    told.textContent = `${names[row]}: ${count} of ${totals[row]} ${verb}`;
  };
  svg.addEventListener("pointermove", tell);
  svg.addEventListener("pointerdown", tell);
}

addThemeSwitch();
document.querySelectorAll("table.sortable").forEach(makeSortable);
document.querySelectorAll("table[data-filter]").forEach(makeFilterable);
document.querySelectorAll("table.bases").forEach(addBaseChoice);
document.querySelectorAll("figure:has(script)").forEach(tellCells);
