"use strict";
// Filters, sorting and the theme. Everything is read from the table itself (data attributes), so that the page is
// complete without this script; the state lives in the address after "#?", so that a view can be linked to.
document.documentElement.classList.add("js");
{
  const root = document.documentElement;
  let kept = null;
  try { kept = localStorage.getItem("epsbench-theme"); } catch { kept = null; } // storage may be forbidden for files
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;
}

addEventListener("DOMContentLoaded", () => {
  const root = document.documentElement;
  const form = document.getElementById("filters");
  const shown = document.getElementById("shown");
  const nothing = document.getElementById("nothing");
  const theme = document.getElementById("theme");
  const boards = [...document.querySelectorAll(".board")];
  const tables = [...document.querySelectorAll("table.sortable")];
  const runTable = document.getElementById("run-table");
  const keys = ["task", "epsilon", "method", "family", "device", "public", "status"];

  // One entry a row: its values once, its text when first searched.
  const rows = [...document.querySelectorAll("table.sortable tbody tr")].map((tr) => {
    const board = tr.closest(".board");
    return { tr, board, data: { ...tr.dataset, ...(board ? board.dataset : {}) }, text: null };
  });
  const runRows = new Map(rows.filter((r) => r.tr.id).map((r) => [r.tr.id, r.tr]));
  const anchors = new Set(runRows.keys());

  const state = new Map(); // filters by name, "sort" and "runsort" as key or key.desc, "run" as a line's id

  function read() {
    state.clear();
    if (location.hash.startsWith("#?")) {
      for (const [k, v] of new URLSearchParams(location.hash.slice(2))) state.set(k, v);
    }
  }

  function write(push) {
    const query = new URLSearchParams([...state].filter(([, v]) => v !== "")).toString();
    const url = query ? "#?" + query : location.pathname.split("/").pop() || "#";
    history[push ? "pushState" : "replaceState"](null, "", url);
  }

  function fits(row, words) {
    for (const key of keys) {
      const want = state.get(key);
      if (!want) continue;
      const have = row.data[key] || "";
      if (key === "status" ? !have.split(" ").includes(want) : have !== want) return false;
    }
    if (!words.length) return true;
    row.text ??= (row.tr.textContent + " " + (row.data.task || "")).toLowerCase();
    return words.every((w) => row.text.includes(w));
  }

  function filter() {
    const words = (state.get("text") || "").toLowerCase().split(/\s+/).filter(Boolean);
    const seen = new Map(boards.map((b) => [b, false]));
    let [visible, total] = [0, 0];
    for (const row of rows) {
      const hide = !fits(row, words);
      if (row.tr.hidden !== hide) row.tr.hidden = hide;
      if (!row.board) continue;
      const reference = row.tr.parentNode.classList.contains("references");
      if (!reference) total += 1;
      if (!hide && !reference) visible += 1;
      if (!hide) seen.set(row.board, true);
    }
    for (const [board, any] of seen) board.hidden = !any;
    const task = state.get("task");
    for (const glance of document.querySelectorAll(".glances > div")) glance.hidden = Boolean(task) && glance.dataset.task !== task;
    nothing.hidden = visible > 0 || total === 0;
    shown.textContent = visible === total ? `${total} rows` : `${visible} of ${total} rows`;
  }

  // ---------------------------------------------------------------------------------------------------- sorting
  const original = new Map();
  for (const table of tables) for (const body of table.tBodies) original.set(body, [...body.rows]);

  function sort(table) {
    const wanted = state.get(table === runTable ? "runsort" : "sort") || "";
    const [key, direction] = wanted.split(".");
    const heads = [...table.tHead.rows[0].cells];
    const column = heads.findIndex((th) => th.dataset.key === key);
    for (const [i, th] of heads.entries()) {
      if (i === column && key) th.setAttribute("aria-sort", direction === "desc" ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    }
    for (const body of table.tBodies) {
      const order = [...original.get(body)];
      if (key && column >= 0) {
        const numeric = heads[column].classList.contains("num") || key === "rank";
        const value = new Map(order.map((tr) => {
          const cell = tr.cells[column];
          if (!numeric) return [tr, (cell.dataset.by || cell.textContent).trim().toLowerCase()];
          const by = cell.dataset.by;
          return [tr, !by ? null : by === "inf" ? Infinity : Number(by)];
        }));
        const sign = direction === "desc" ? -1 : 1;
        const collator = new Intl.Collator("en", { numeric: true });
        order.sort((p, q) => {
          const [a, b] = [value.get(p), value.get(q)];
          if (a === null || b === null) return (a === null) - (b === null); // unknown last, whatever the direction
          return sign * (numeric ? (a < b ? -1 : a > b ? 1 : 0) : collator.compare(a, b));
        });
      }
      body.append(...order);
    }
  }

  function sortAll(run) {
    for (const table of tables) if ((table === runTable) === run) sort(table);
  }

  for (const table of tables) {
    for (const th of table.tHead.rows[0].cells) {
      th.querySelector("button")?.addEventListener("click", () => {
        const name = table === runTable ? "runsort" : "sort";
        const key = th.dataset.key;
        const descendingFirst = th.classList.contains("num");
        const steps = descendingFirst ? [key + ".desc", key, ""] : [key, key + ".desc", ""];
        state.set(name, steps[(steps.indexOf(state.get(name) || "") + 1) % 3]);
        sortAll(table === runTable);
        write(false);
      });
    }
  }

  // ------------------------------------------------------------------------------------------------- one run's line
  function aim(id, focus) {
    for (const tr of runTable.querySelectorAll(".aimed")) tr.classList.remove("aimed");
    const target = runRows.get(id);
    if (!target) return;
    for (const { tr } of rows) {
      if (tr.id && tr.dataset.group === target.dataset.group) {
        tr.hidden = false;
        tr.classList.add("aimed");
      }
    }
    target.scrollIntoView({ block: "center" });
    if (focus) target.focus({ preventScroll: true });
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    const id = link && decodeURIComponent(link.getAttribute("href").slice(1));
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault(); // an ordinary jump would replace the filters in the address
    if (anchors.has(id)) {
      state.set("run", id);
      write(true);
      aim(id, true);
    } else {
      document.getElementById(id)?.scrollIntoView();
    }
  });

  // ----------------------------------------------------------------------------------------------------- everything
  function show() {
    for (const field of form.elements) {
      if (!field.name) continue;
      if (field.type === "checkbox") field.checked = state.get(field.name) === "1";
      else field.value = state.get(field.name) || "";
    }
    for (const table of tables) table.classList.toggle("all", state.get("more") === "1");
    sortAll(false);
    sortAll(true);
    filter();
    const plain = location.hash.slice(1);
    aim(state.get("run") || (anchors.has(plain) ? plain : ""), false);
  }

  let wait = 0;
  form.addEventListener("input", (event) => {
    const field = event.target;
    state.set(field.name, field.type === "checkbox" ? (field.checked ? "1" : "") : field.value);
    for (const table of tables) table.classList.toggle("all", state.get("more") === "1");
    clearTimeout(wait);
    wait = setTimeout(() => { filter(); write(false); }, field.type === "search" ? 120 : 0);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    state.clear();
    write(false);
    show();
  });
  addEventListener("hashchange", () => { read(); show(); });
  addEventListener("popstate", () => { read(); show(); });

  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  function dark() { return root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches; }
  function label() { theme.textContent = dark() ? "Light" : "Dark"; theme.setAttribute("aria-label", `Use the ${dark() ? "light" : "dark"} theme`); }
  theme.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("epsbench-theme", root.dataset.theme); } catch { label(); } // kept only for this page
    label();
  });
  prefersDark.addEventListener("change", label);
  label();
  theme.hidden = false;
  form.hidden = false;
  read();
  show();
});
