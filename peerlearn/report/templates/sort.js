"use strict";
// Sorts the tables of a page: each heading becomes a button. Numbers come before text, and missing cells stand last.
const words = new Intl.Collator("en", { numeric: true });

function cellKey(row, column) {
  const cell = row.cells[column];
  const value = cell.dataset.value;
  if (value !== undefined) return [0, Number(value)];
  return cell.classList.contains("missing") ? [2, ""] : [1, cell.textContent];
}

function sortTable(table, column, direction) {
  const body = table.tBodies[0];
  for (const heading of table.tHead.rows[0].cells) heading.removeAttribute("aria-sort");
  if (direction) table.tHead.rows[0].cells[column].setAttribute("aria-sort", direction);
  const sign = direction === "descending" ? -1 : 1;
  const keyed = table.rowsAsWritten.map((row) => [direction ? cellKey(row, column) : [0, 0], row]);
  keyed.sort(([a], [b]) => {
    if (a[0] !== b[0]) return a[0] === 2 || b[0] === 2 ? a[0] - b[0] : sign * (a[0] - b[0]);
    return sign * (a[0] === 0 ? a[1] - b[1] : words.compare(a[1], b[1]));
  });
  body.append(...keyed.map(([, row]) => row));
}

const following = { ascending: "descending", descending: "" };

function makeSortable(table) {
  table.rowsAsWritten = [...table.tBodies[0].rows];
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => {
      const now = heading.getAttribute("aria-sort");
      sortTable(table, column, now ? following[now] : "ascending");
    });
    heading.append(button);
  });
}

for (const table of document.querySelectorAll("table")) makeSortable(table);
