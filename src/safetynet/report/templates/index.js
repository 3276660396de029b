"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const heads = [...$("runs").querySelectorAll("thead th")];
  const body = $("runs").querySelector("tbody");
  const key = (row, column) => {
    const cell = row.children[column];
    const text = cell ? cell.dataset.key : "";
    const number = Number(text);
    return text !== "" && !Number.isNaN(number) ? number : text;
  };
  const order = (a, b) => {
    if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    return typeof a === "number" ? 1 : -1;
  };
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((one) => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.children].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => (down ? order(b, a) : order(a, b)));
    body.append(...rows.map(([, row]) => row));
  }));
  const filter = () => {
    const words = $("search").value.toLowerCase();
    let count = 0;
    for (const row of body.children) {
      row.hidden = !row.textContent.toLowerCase().includes(words);
      if (!row.hidden) count += 1;
    }
    $("count").textContent = `${count} of ${body.children.length}`;
  };
  $("search").addEventListener("input", filter);
  document.querySelector("form.pick").addEventListener("submit", (event) => event.preventDefault());
  filter();
})();
