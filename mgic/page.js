"use strict";

// Tables: a click on a head sorts by its column, numbers as numbers; text in the box above hides the rows without it.
const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();

function sort(table, column, descending) {
  const rows = [...table.tBodies[0].rows];
  const numeric = rows.every((row) => value(row, column) === "" || !Number.isNaN(Number(value(row, column))));
  rows.sort((a, b) => {
    const [x, y] = [value(a, column), value(b, column)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
    return descending ? -order : order;
  });
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) =>
    head.querySelector("button").addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sort(table, column, descending);
    }),
  );
}

for (const box of document.querySelectorAll(".filter input")) {
  const table = document.getElementById(box.dataset.table);
  box.addEventListener("input", () => {
    const wanted = box.value.toLowerCase();
    for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}

// Marks: pointing at one, or reaching it with the keyboard, shows what it says.
const says = document.getElementById("says");

function show(mark) {
  says.textContent = mark.dataset.says;
  says.hidden = false;
  const place = mark.getBoundingClientRect();
  const left = Math.min(place.right + 8, document.documentElement.clientWidth - says.offsetWidth - 8);
  says.style.left = `${Math.max(left, 8)}px`;
  says.style.top = `${Math.max(place.top - says.offsetHeight - 8, 8)}px`;
}

for (const mark of document.querySelectorAll("[data-says]")) {
  for (const event of ["pointerenter", "focus"]) mark.addEventListener(event, () => show(mark));
  for (const event of ["pointerleave", "blur"]) mark.addEventListener(event, () => { says.hidden = true; });
}
document.documentElement.dataset.ready = "yes";
